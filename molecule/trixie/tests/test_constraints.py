"""Limits that SLURM enforces with cgroups: a job gets what it requested, and users may log in only with a job."""

from __future__ import annotations

import shlex
import subprocess

from nodes import COMPUTE, SSH_CONFIG, accounts, as_user, node, wait_for

# Writes to every page that it allocates.
TAKES = "python3 -c 'bytes(range(256)) * (4096 * {megabytes})'"


def test_the_plug_in_follows_the_machine_s_cgroups() -> None:
    for name in COMPUTE:
        host = node(name)
        version = (
            "v2" if host.run("stat --file-system --format=%T /sys/fs/cgroup").stdout.strip() == "cgroup2fs" else "v1"
        )
        process = host.check_output("systemctl show --property=MainPID --value slurmd")
        assert f"cgroup_{version}.so" in host.file(f"/proc/{process}/maps").content_string


def test_a_job_that_takes_more_memory_than_it_asked_for_is_killed() -> None:
    fits = as_user(
        f"sbatch --parsable --wait --mem=200 --output=/dev/null --wrap={shlex.quote(TAKES.format(megabytes=100))}"
    )
    assert accounts(fits, "State,ExitCode") == "COMPLETED|0:0"
    over = f"sbatch --parsable --wait --mem=100 --output=/dev/null --wrap={shlex.quote(TAKES.format(megabytes=600))}"
    job = as_user(f"{over} || true")
    wait_for("the job in the accounts", lambda: accounts(job, "State") not in ("", "RUNNING"))
    assert accounts(job, "State") == "OUT_OF_MEMORY"


def test_a_job_has_no_more_cores_than_it_asked_for() -> None:
    count = "python3 -c 'import os; print(len(os.sched_getaffinity(0)))'"
    assert node("n1").check_output("nproc --all") != "1", "a machine with one core cannot test this"
    assert as_user(f"srun --nodelist=n1 --ntasks=1 --cpus-per-task=1 {count}") == "1"
    # It cannot take other cores either.
    assert (
        as_user(
            "srun --nodelist=n1 --ntasks=1 taskset --cpu-list --pid 0-63 0 >/dev/null; "
            f"srun --nodelist=n1 --ntasks=1 sh -c {shlex.quote('taskset --cpu-list 0-63 ' + count)}"
        )
        == "1"
    )


def test_a_job_has_no_device_that_it_did_not_ask_for() -> None:
    reads = "srun --nodelist=n1 --mem=50 {options} sh -c 'head --bytes=1 /dev/full | wc --bytes'"
    assert as_user(reads.format(options="")) == "0"
    assert as_user(reads.format(options="--gres=card:1")) == "1"


def test_each_job_has_a_tmp_of_its_own_which_is_gone_with_it() -> None:
    name = "left-by-a-job"
    assert (
        as_user(f"srun --nodelist=n1 sh -c 'touch /tmp/{name} /dev/shm/{name}; ls /tmp /dev/shm'").split().count(name)
        == 2
    )
    assert name not in as_user("srun --nodelist=n1 ls /tmp /dev/shm")
    assert not node("n1").file(f"/tmp/{name}").exists
    assert not node("n1").file(f"/dev/shm/{name}").exists
    wait_for("the folders gone", lambda: not node("n1").check_output("find /var/lib/slurm/tmp -name '*left-by-a-job*'"))


def login(user: str, command: str) -> tuple[int, str]:
    """Logs in to n1; returns the exit status and the output."""
    words = ["ssh", "-F", str(SSH_CONFIG), "-o", "BatchMode=yes", f"{user}@n1", command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_login_without_a_job_is_refused_and_with_one_is_part_of_it() -> None:
    status, said = login("researcher", "id -un")
    assert status != 0
    assert "Access denied" in said
    job = as_user("sbatch --parsable --nodelist=n1 --mem=100 --output=/dev/null --wrap='sleep 300'")
    try:
        wait_for("the job", lambda: as_user(f"squeue --noheader --format=%T --jobs={job}") == "RUNNING")
        status, said = login("researcher", "id -un; cat /proc/self/cgroup; touch /tmp/adopted")
        assert status == 0, said
        assert said.splitlines()[0] == "researcher"
        assert f"job_{job}/" in said
        # It has the job's memory limit and its /tmp.
        assert login("researcher", TAKES.format(megabytes=20))[0] == 0
        # Status of the killed process, or of the killed login.
        assert login("researcher", TAKES.format(megabytes=600))[0] in (137, 255)
        assert not node("n1").file("/tmp/adopted").exists
        # Another user's job does not permit a login.
        assert login("bob", "true")[0] != 0
    finally:
        as_user(f"scancel {job}")
    # Processes of the job may run until KillWait has passed.
    wait_for("logins refused after the job", lambda: login("researcher", "true")[0] != 0, 30)
