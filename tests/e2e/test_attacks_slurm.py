"""A user's jobs (mallory) try to become root or another user (bob) on shared nodes, without an effect on bob's jobs."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

import pytest
from lab import Lab, wait_for

pytestmark = pytest.mark.lab

IMAGE = "/shared/images/training/current"
# The start of mallory's scripts.
START = f"""
import glob, json, os, subprocess, sys, time
job, node, user = os.environ["SLURM_JOB_ID"], os.environ["SLURMD_NODENAME"], os.environ["USER"]
bundle, proof = f"/shared/bundles/{{user}}/attack-{{job}}", f"/shared/runs/{{user}}/proof-{{job}}"
subprocess.run(["/opt/ictx/bin/ictx-bundle", "--image", "{IMAGE}", "--output", bundle], check=True)
def step(*command, bundle=bundle):
    return subprocess.Popen(["srun", "--overlap", "--mem=50", f"--container={{bundle}}", *command])
"""
HOOK = START + """
sleeper = step("sleep", "30")
while not (found := glob.glob(f"/run/ictx-oci/{user}/*.{job}.*/state.json")):
    assert sleeper.poll() is None
    time.sleep(0.1)
time.sleep(1)
state = json.load(open(found[0]))
state["id"], state["init_process_pid"] = f"{node}.{user}.{job}.1.0", 999999
state["config"]["Hooks"] = {"poststop": [{"path": "/bin/sh", "args": ["sh", "-c", f"id -u >>{proof}"]}]}
os.mkdir(f"/run/ictx-oci/{user}/{state['id']}")
json.dump(state, open(f"/run/ictx-oci/{user}/{state['id']}/state.json", "w"))
step("true").wait()
sleeper.terminate()
sleeper.wait()
"""
RACE = START + """
for number in range(4):
    srun = step("true")
    while srun.poll() is None:
        old = f"/var/spool/slurmd/oci-job{int(job):05d}-{number:05d}"
        for folder in (old, f"/run/ictx-oci/.steps/{job}.{number}"):
            try:
                os.rename(f"{folder}/config.json", f"{folder}/away")
                os.symlink(sys.argv[1], f"{folder}/config.json")
            except OSError:
                continue
"""
PEEK = START + """
victim, end = sys.argv[1], time.monotonic() + 10
os.rename(f"{bundle}/config.json", f"{bundle}/away")
for folder in (f"/var/spool/slurmd/oci-job{int(victim):05d}-00000", f"/run/ictx-oci/.steps/{victim}.0"):
    if os.path.isdir(folder):
        os.symlink(f"{folder}/config.json", f"{bundle}/config.json")
assert os.path.islink(f"{bundle}/config.json")
srun = step("true")
while srun.poll() is None and time.monotonic() < end:
    old = glob.glob(f"/var/spool/slurmd/oci-job{int(job):05d}-*/*")
    for path in old + glob.glob(f"/run/ictx-oci/.steps/{job}.*/*"):
        try:
            open(proof, "a").write(open(path).read())
        except OSError:
            continue
open(proof, "a").close()
"""


def submitted(lab: Lab, user: str, *options: str, script: str = "", node: str = "n1") -> str:
    """Submits a small job of a user, with a Python script if given; returns its number."""
    if script:
        program, _, arguments = script.partition("\0")
        encoded = base64.b64encode(program.encode()).decode()
        options = (*options, f"--wrap='echo {encoded} | base64 --decode | python3 - {arguments}'")
    done = lab.run(
        "ctl",
        f"cd /tmp && sbatch --parsable --nodelist={node} --mem=300 --time=5 --output=/shared/runs/{user}/%j.log "
        + " ".join(options),
        user=user,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def ended(lab: Lab, job: str) -> str:
    """Waits for the end of a job; returns its log."""
    wait_for(f"the end of job {job}", lambda: not lab.run("ctl", f"squeue --noheader --jobs={job}").stdout.strip(), 120)
    return lab.run("ctl", f"cat /shared/runs/*/{job}.log").stdout


@pytest.fixture
def secret(lab: Lab) -> Iterator[str]:
    """A file on n1 that only root can read."""
    lab.run("n1", "umask 077; echo roots-secret >/root/of-root")
    yield "/root/of-root"
    lab.run("n1", "rm -f /root/of-root")


@pytest.fixture
def bobs(lab: Lab) -> Iterator[str]:
    """Bob's job, in a container on n1 with a secret in its environment."""
    command = (
        "bundle=/shared/bundles/bob/$SLURM_JOB_ID; "
        f"/opt/ictx/bin/ictx-bundle --image {IMAGE} --output $bundle && "
        # PID 1 of a container ignores signals without a handler: the job's end would take KillWait.
        'SECRET=of-bob srun --container=$bundle sh -c "trap exit TERM; sleep 120 & wait"'
    )
    job = submitted(lab, "bob", f"--wrap='{command}'")
    wait_for(
        "bob's container", lambda: lab.run("n1", f"ls /run/ictx-oci/bob/*.{job}.0.0/state.json").returncode == 0, 60
    )
    yield job
    lab.run("ctl", f"scancel {job}")
    ended(lab, job)


@pytest.mark.attack(
    "C1",
    "a job writes a container state with a hook into its user's folder and starts the step with that number",
    before="slurmstepd ran the runtime, and thus the hook, as root on every compute node",
    now="the hook runs as the user",
)
def test_a_hook_in_a_containers_state_does_not_run_as_root(lab: Lab) -> None:
    job = submitted(lab, "mallory", script=HOOK)
    print(ended(lab, job))
    proof = f"/shared/runs/mallory/proof-{job}"
    ran_as = lab.run("ctl", f"stat --format=%u {proof}; cat {proof}").stdout.split()
    assert ran_as, "the hook was not started, so the attack was not attempted"
    assert set(ran_as) == {"2003"}
    assert lab.run("ctl", f"find /shared/runs/mallory -newer {proof} -uid 0").stdout == ""


@pytest.mark.attack(
    "C1",
    "while a step starts, the user replaces the step's config.json by a link to a file of root",
    before="slurmstepd gave the file to the user's group: /etc/shadow or MUNGE's key became readable",
    now="links are not followed in the folders to which slurmstepd writes: the file is not changed",
)
def test_no_file_of_roots_is_given_away(lab: Lab, secret: str) -> None:
    before = lab.run("n1", f"stat --format='%A %U %G' {secret}").stdout
    log = ended(lab, submitted(lab, "mallory", script=f"{RACE}\0{secret}"))
    print(log)
    assert lab.run("n1", f"stat --format='%A %U %G' {secret}").stdout == before


@pytest.mark.attack(
    "C1",
    "a bundle's config.json is a link to the config.json of another user's running step",
    before="slurmstepd, as root, copied the other user's environment, including passwords, into the attacker's folder",
    now="a step's file is emptied once its container has started",
)
def test_the_environment_of_anothers_container_is_not_copied(lab: Lab, bobs: str) -> None:
    job = submitted(lab, "mallory", script=f"{PEEK}\0{bobs}")
    print(ended(lab, job))
    proof = lab.run("ctl", f"cat /shared/runs/mallory/proof-{job}")
    assert proof.returncode == 0
    assert "of-bob" not in proof.stdout


@pytest.mark.attack(
    "C1",
    "on a node, the container folder of a user belongs to another user or is a link",
    before="the prolog, as root, changed the owner of the target to the user",
    now="the job does not start, and the node's log names the folder",
)
@pytest.mark.parametrize("make", ["mkdir {0} && chown mallory {0}", "ln -s /etc {0}"], ids=["another's", "link"])
def test_a_folder_of_containers_that_is_not_the_users_own_stops_the_job(lab: Lab, make: str) -> None:
    state = "/run/ictx-oci/bob"
    owner = lab.run("n2", "stat --format='%U %a' /etc").stdout
    assert lab.run("n2", make.format(state)).returncode == 0
    job = submitted(lab, "bob", "--wrap='echo started'", node="n2")
    try:
        wait_for(
            "the refusal",
            lambda: f"job {job} does not start: {state}"
            in lab.run("n2", "journalctl --no-pager -t ictx-prolog").stdout,
            60,
        )
        assert lab.run("n2", "stat --format='%U %a' /etc").stdout == owner
    finally:
        lab.run("ctl", f"scancel {job}")
        ended(lab, job)
        lab.run("n2", f"rm -rf {state}")
        lab.run("ctl", "scontrol update nodename=n2 state=resume")
    assert "started" not in lab.run("ctl", f"cat /shared/runs/bob/{job}.log").stdout
    assert lab.run("ctl", "cd /tmp && srun --nodelist=n2 --mem=50 --immediate=60 hostname", user="bob").stdout == "n2\n"


@pytest.mark.attack(
    "C2",
    "the attacker creates the folders of another user's next jobs, with a malicious bundle",
    before="the other user's job ran the hooks of that bundle",
    now="users cannot write to other users' folders, and a job uses only a folder that it created itself",
)
@pytest.mark.attack(
    "C3",
    "a checkpoint with a pickle is placed in another user's run",
    before="the next start of that run unpickled it",
    now="other users cannot write there",
)
def test_nothing_is_put_into_anothers_folders(lab: Lab) -> None:
    for command in (
        "mkdir /shared/runs/bob/999999",
        "mkdir /shared/bundles/bob/999999",
        "ls /shared/runs/bob",
        "ls /shared/bundles/bob",
        "mkdir /shared/runs/newcomer",
        "ln -s /etc /shared/bundles/newcomer",
        "mv /shared/runs/bob /shared/runs/mallory/bob",
        "touch /shared/images/training/current/image.json",
        "ln -sfn /tmp /shared/images/training/current",
    ):
        done = lab.run("ctl", command, user="mallory")
        assert done.returncode != 0, command
        assert re.search("Permission denied|Operation not permitted", done.stderr), done.stderr
    modes = lab.run("ctl", "stat --format='%a %U %G' /shared/runs/bob /shared/bundles/bob").stdout.splitlines()
    assert modes == ["2750 bob ictx-metrics", "711 bob bob"]


@pytest.mark.attack(
    "C2",
    "the folder of a job exists before the job starts",
    before="the job used the bundle in that folder",
    now="the job ends with an error that names the folder",
)
def test_a_job_does_not_use_a_folder_that_was_there_before(lab: Lab) -> None:
    job = lab.submit("--hold")
    lab.user(f"mkdir /shared/runs/researcher/{job} && scontrol release {job}")
    status, output = lab.follow(job)
    assert status == 1
    assert f"/shared/runs/researcher/{job} was there before the job" in output


@pytest.mark.attack(
    "M6",
    "a program with the SUID bit is placed on the shared directory",
    before="anyone who started it got its owner's permissions; the job image contained eight such programs",
    now="mounts have nosuid and nodev, and images contain no such program",
)
def test_no_program_of_the_shared_directory_has_its_owners_rights(lab: Lab) -> None:
    made = "cp /usr/bin/id /shared/data/id-of-mallory && chmod 4755 /shared/data/id-of-mallory"
    assert lab.run("n1", made, user="mallory").returncode == 0
    try:
        for node in ("ctl", "n1", "n2"):
            options = lab.run(node, "findmnt --noheadings --output OPTIONS --target /shared").stdout.split(",")
            assert {"nosuid", "nodev"} <= {option.strip() for option in options}
            assert lab.run(node, "/shared/data/id-of-mallory -un", user="bob").stdout == "bob\n"
    finally:
        lab.run("n1", "rm /shared/data/id-of-mallory", user="mallory")
    search = (
        f"find -L {IMAGE} -maxdepth 0 >/dev/null && find {IMAGE}/rootfs ! -type l -perm /6022 ! -path '*/tmp' | head"
    )
    assert lab.run("n1", search).stdout == ""


@pytest.mark.attack(
    "M7",
    "squeue, sacct, scontrol and sshare are queried for another user's job",
    before="names, arguments, folders and usage of all jobs were visible",
    now="users see only their own jobs; the metrics account sees all",
)
def test_a_user_sees_his_own_jobs_only(lab: Lab) -> None:
    ended(lab, submitted(lab, "bob", "--wrap=true"))
    job = submitted(lab, "bob", "--hold", "--job-name=private", "--wrap=true")
    try:
        for command in ("squeue", f"scontrol show job {job}", "sacct --allusers --starttime=now-1hour", "sshare --all"):
            output = lab.run("ctl", command, user="mallory").stdout
            assert "private" not in output, command
            assert "bob" not in output, command
        assert "private" in lab.run("ctl", "squeue --format=%j", user="bob").stdout
        assert "private" in lab.run("ctl", "runuser -u ictx-metrics -- squeue --format=%j").stdout
        assert "bob" in lab.run("ctl", "runuser -u ictx-metrics -- sacct --allusers --format=user").stdout.split()
        assert lab.run("ctl", "runuser -u ictx-metrics -- sbatch --chdir=/tmp --wrap=true").returncode != 0
    finally:
        lab.run("ctl", f"scancel {job}")


@pytest.mark.attack(
    "M7",
    "a job is submitted to the partition `urgent`, which preempts all other jobs",
    before="accepted",
    now="rejected, except for users listed in the inventory",
)
@pytest.mark.parametrize("options", ["--partition=urgent", "--partition=urgent --qos=urgent"])
def test_the_urgent_partition_is_for_those_who_may(lab: Lab, options: str) -> None:
    done = lab.run("ctl", f"sbatch --chdir=/tmp --hold {options} --wrap=true", user="mallory")
    assert done.returncode != 0
    assert "qos" in done.stderr.lower()
    job = lab.user(
        "sbatch --parsable --chdir=/tmp --hold --partition=urgent --qos=urgent --output=/dev/null --wrap=true"
    )
    lab.user(f"scancel {job}")


@pytest.mark.attack(
    "M7",
    "a job leaves processes, files in /dev/shm and container state behind, and reads other users' /dev/shm",
    before="they remained after the job, and all jobs of a node shared one /dev/shm",
    now="the epilog removes them, as their user; each container has its own /dev/shm",
)
def test_nothing_is_left_of_a_job(lab: Lab) -> None:
    job = submitted(
        lab,
        "mallory",
        script=START + """
open(f"/dev/shm/left-{user}", "w").close()
os.mkdir(f"/run/ictx-oci/{user}/left")
os.symlink("/etc", f"/run/ictx-oci/{user}/left/etc")
subprocess.Popen(["setsid", "--fork", "sleep", "3210"], env={"PATH": "/usr/bin"})
step("ls", "/dev/shm").wait()
""",
    )
    assert "left-mallory" not in ended(lab, job)
    for trace in ("pgrep --uid mallory", "ls /dev/shm/left-mallory", "ls --directory /run/ictx-oci/mallory"):
        wait_for(f"that `{trace}` finds nothing", lambda trace=trace: lab.run("n1", trace).returncode != 0, 60)
    assert lab.run("n1", "test -e /etc/passwd").returncode == 0


def test_the_epilog_of_one_job_leaves_another_of_the_user_alone(lab: Lab, bobs: str) -> None:
    ended(lab, submitted(lab, "bob", "--wrap=true"))
    assert lab.run("n1", f"ls /run/ictx-oci/bob/*.{bobs}.0.0/state.json").returncode == 0
    assert lab.run("n1", "pgrep --uid bob --full 'sleep 120'").returncode == 0


@pytest.fixture
def mail(lab: Lab) -> Iterator[str]:
    """Installs a mail program on the controller that records its arguments."""
    log = "/tmp/mails"
    text = f"printf '#!/bin/sh\\necho \"$@\" >>{log}\\n' >/usr/bin/mail; chmod 755 /usr/bin/mail"
    assert lab.run("ctl", f"test ! -e /usr/bin/mail && {text} && install -m 0666 /dev/null {log}").returncode == 0
    yield log
    lab.run("ctl", f"rm -f /usr/bin/mail {log}")


@pytest.mark.attack(
    "C1",
    "mail about a job is sent to `--exec=!COMMAND` or `|COMMAND`",
    before="slurmctld passed it to the mail program as SlurmUser",
    now="rejected; only addresses get mail",
)
def test_the_recipient_of_mail_is_an_address(lab: Lab, mail: str) -> None:
    for recipient in ("--exec=!id", "|id"):
        ended(lab, submitted(lab, "mallory", f"--mail-type=ALL '--mail-user={recipient}' --wrap=true"))
    job = submitted(lab, "bob", "--mail-type=ALL --mail-user=bob@example.org --wrap=true")
    wait_for("bob's mail", lambda: f"Job_id={job} " in lab.run("ctl", f"cat {mail}").stdout, 60)
    assert set(re.findall(r"\S+$", lab.run("ctl", f"cat {mail}").stdout, re.MULTILINE)) == {"bob@example.org"}
