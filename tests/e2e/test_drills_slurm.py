"""Drills of SLURM: a network partition, a wrong clock, damaged and full storage. No work of a job is lost."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from lab import SHARED, Lab, wait_for
from recovery import Drill
from test_lifecycle import states, waiting
from test_pipeline import COMPUTE, kill, ranks
from test_training import SHORT, STEPS_OF_A_SHORT_RUN, assert_resumed

pytestmark = [pytest.mark.lab, pytest.mark.full]

GO = "/shared/runs/researcher/drill-go"


def on(lab: Lab, node: str, command: str) -> str:
    """Returns the output of a command that root runs on a node; it must succeed."""
    done = lab.run(node, command)
    assert done.returncode == 0, f"{node}: {command}: {done.stderr}{done.stdout}"
    return done.stdout


@contextmanager
def cut_off(lab: Lab, node: str) -> Iterator[None]:
    """Drops all packets from a node to the controller until the block ends; both keep running."""
    route = f"blackhole {lab.address('ctl')}/32"
    on(lab, node, f"ip route add {route}")
    try:
        yield
    finally:
        lab.run(node, f"ip route del {route}")


def state(lab: Lab, job: str) -> str:
    """Returns the state of a job in the queue; empty if it is not in the queue."""
    return lab.user(f"squeue --me --noheader --format='%i %T' | sed -n 's/^{job} //p'")


def patience(lab: Lab) -> int:
    """Returns the seconds after which the controller sets a silent node down."""
    return int(on(lab, "ctl", "scontrol show config | sed -n 's/^SlurmdTimeout *= \\([0-9]*\\) sec/\\1/p'"))


def end(lab: Lab, job: str) -> None:
    """Ends a job that waits for the file."""
    lab.user(f"touch {GO}")
    wait_for("the job's end", lambda: lab.accounts(job, "State,ExitCode") == "COMPLETED|0:0", 180)


@pytest.mark.drill(
    "a node is cut off from the controller for half of SlurmdTimeout",
    keeps="the running job, without a restart",
    acts="nobody",
)
def test_a_short_partition_costs_nothing(lab: Lab, drill: Drill) -> None:
    job = waiting(lab, "n2", GO)
    seconds = patience(lab) / 2
    with drill.recovery():
        with cut_off(lab, "n2"):
            assert lab.run("n2", f"timeout 1 bash -c '</dev/tcp/{lab.address('ctl')}/6817'").returncode != 0
            time.sleep(seconds)
        assert (state(lab, job), lab.restarts(job)) == ("RUNNING", 0)
        end(lab, job)


@pytest.mark.drill(
    "a node is cut off from the controller until it is set down",
    keeps="the job, which runs once: the copy behind the partition is terminated",
    acts="nobody",
)
def test_a_long_partition_requeues_the_job_and_leaves_one_copy(lab: Lab, drill: Drill) -> None:
    job = waiting(lab, "n2", GO)
    # The pattern excludes the srun that started the step.
    copies = f"pgrep --count --full '^[^ ]*sh -c until .* -e {GO}' || true"
    with cut_off(lab, "n2"):
        wait_for("n2 down", lambda: states(lab)["n2"].startswith("down"), 600)
        assert int(on(lab, "n2", copies)) > 0, "the job keeps running behind the partition"
    with drill.recovery():
        wait_for("the job again", lambda: state(lab, job) == "RUNNING" and lab.restarts(job) == 1, 600)
        wait_for("one copy", lambda: int(on(lab, "n2", copies)) == 1, 120)
    end(lab, job)
    wait_for("n2 in service", lambda: states(lab)["n2"] == "idle", 120)


# A container shares its host's clock. SLURM depends on MUNGE's clock, so only that one is changed.
CLOCK = "/run/systemd/system/munge.service.d/clock.conf"
AHEAD = "LD_PRELOAD=/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1 FAKETIME=+1h FAKETIME_DONT_FAKE_MONOTONIC=1"


@pytest.mark.drill(
    "the clock by which MUNGE works on a node is an hour ahead for half of SlurmdTimeout",
    keeps="the running job, without a restart; no credential is accepted there meanwhile",
    acts="nobody",
)
def test_a_clock_that_jumps_is_refused_and_harms_no_job(lab: Lab, drill: Drill) -> None:
    job = waiting(lab, "n2", GO)
    on(lab, "n2", "apt-get install --yes --quiet --no-install-recommends libfaketime")

    def accepted() -> bool:
        return lab.run("n2", f"echo {on(lab, 'ctl', 'munge --no-input').strip()} | unmunge").returncode == 0

    try:
        on(lab, "n2", f"mkdir -p {CLOCK.rpartition('/')[0]} && printf '[Service]\\nEnvironment={AHEAD}\\n' >{CLOCK}")
        on(lab, "n2", "systemctl daemon-reload && systemctl restart munge")
        assert not accepted()
        time.sleep(patience(lab) / 2)
    finally:
        with drill.recovery():
            on(lab, "n2", f"rm -f {CLOCK} && systemctl daemon-reload && systemctl restart munge")
            wait_for("credentials", accepted, 60)
    assert (state(lab, job), lab.restarts(job)) == ("RUNNING", 0)
    end(lab, job)
    assert lab.user("srun --nodelist=n2 --immediate=120 hostname") == "n2"


def training(lab: Lab, *options: str) -> str:
    """Submits a short training job that registers nothing; returns its number."""
    return lab.submit(*options, "pretrain/tiny.yaml", *SHORT)


@pytest.mark.drill(
    "the newest checkpoint is damaged on the storage, and the job loses a rank",
    keeps="every step once; the job resumes from the previous checkpoint and sets the damaged one aside",
    acts="nobody",
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(lab: Lab, drill: Drill) -> None:
    job = training(lab)
    folder = lab.folder(job) / "checkpoints"
    lab.wait_in(job, "two checkpoints", lambda: len(list(folder.glob("step-????????"))) >= 2)
    for node in COMPUTE:
        on(lab, node, f"pkill --signal STOP --full '{ranks(job)}'")
    before, newest = sorted(folder.glob("step-????????"))[-2:]
    file = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    seek = file.stat().st_size // 2
    inside = "/shared" / file.relative_to(SHARED)
    on(lab, "ctl", f"printf {uuid.uuid4()} | dd of={inside} bs=1 seek={seek} conv=notrunc status=none")
    with drill.recovery():
        kill(lab, job, "n2")
        for node in COMPUTE:
            lab.run(node, f"pkill --signal CONT --full '{ranks(job)}'")
        wait_for("the job again", lambda: lab.restarts(job) == 1 and state(lab, job) in ("RUNNING", ""), 600)
    status, output = lab.follow(job)
    assert status == 0, output[-3000:]
    assert f"checkpoint {newest.name} is not used: " in output
    assert lab.result(job)["resumed_from_step"] == int(before.name.removeprefix("step-"))
    assert_resumed(lab, job)


@pytest.fixture
def small(lab: Lab) -> Iterator[str]:
    """Mounts a small file system for researcher's runs on n1, which a test can fill; yields the folder."""
    folder = "/shared/runs/researcher"
    # In a container, new mounts are not propagated to running units.
    on(lab, "n1", f"mount -t tmpfs -o size=400M,uid=2001,mode=0750 drill {folder} && systemctl restart slurmd")
    yield folder
    lab.run("ctl", "scancel --user=researcher")
    wait_for("no job", lambda: not lab.user("squeue --me --noheader"), 180)
    on(lab, "n1", f"systemctl stop slurmd; umount --lazy {folder}; systemctl start slurmd")
    wait_for("n1 in service", lambda: states(lab)["n1"] == "idle", 400)


@pytest.mark.drill(
    "the shared storage is full while a job trains",
    keeps="every step once; complete checkpoints",
    acts="scontrol requeue JOB, after freeing space",
)
def test_a_full_disk_is_named_and_the_job_resumes_once_there_is_space(lab: Lab, small: str, drill: Drill) -> None:
    def seen(command: str) -> str:
        return lab.run("n1", command).stdout

    job = training(lab, "--nodes=1", "--nodelist=n1")
    log, run = f"{small}/{job}.log", f"{small}/{job}"
    wait_for("two checkpoints", lambda: len(seen(f"ls -d {run}/checkpoints/step-????????").split()) >= 2, 600)
    lab.run("n1", f"dd if=/dev/zero of={small}/filler bs=1M status=none")
    wait_for("the reason in the log", lambda: "No space left on device" in seen(f"cat {log}"), 300)
    wait_for("the job's end", lambda: state(lab, job) != "RUNNING", 300)
    with drill.recovery():
        on(lab, "n1", f"rm {small}/filler")
        if not state(lab, job):
            lab.user(f"scontrol requeue {job}")
        wait_for("the job again", lambda: state(lab, job) == "RUNNING", 300)
    wait_for("the end", lambda: lab.accounts(job, "State") == "COMPLETED", 600)
    steps = [int(step) for step in seen(f"grep -o '\"step\": [0-9]*' {run}/metrics.jsonl | cut -d' ' -f2").split()]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS_OF_A_SHORT_RUN
    assert 0 < json.loads(seen(f"cat {run}/result.json"))["resumed_from_step"] < STEPS_OF_A_SHORT_RUN
