"""The primary controller is killed while jobs run and wait: the backup takes them over, and later returns them."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from nodes import CONTROLLERS, accounts, as_user, node, queued, states, wait_for

GO = "/shared/failover-go"
PRIMARY, BACKUP = CONTROLLERS


def until(file: str) -> str:
    """Returns a command that ends when a file exists."""
    return f"until [ -e {file} ]; do sleep 1; done"


def answers(seconds: int = 5) -> bool:
    """Returns whether a controller lists the queue within `seconds`."""
    return bool(node(PRIMARY).run(f"timeout {seconds} squeue --noheader").rc == 0)


def stopped(name: str) -> None:
    """Kills a controller; it stays down until `started`."""
    node(name).check_output("systemctl mask --runtime slurmctld && systemctl kill --signal=KILL slurmctld")


def started(name: str) -> None:
    """Starts a controller that was killed."""
    node(name).check_output("systemctl unmask --runtime slurmctld && systemctl start slurmctld")


@pytest.fixture
def both() -> Iterator[None]:
    """Restarts both controllers and empties the queue afterwards."""
    node(PRIMARY).check_output(f"rm -f {GO}-1 {GO}-2")
    yield
    for name in CONTROLLERS:
        started(name)
    wait_for("a controller", answers)
    node(PRIMARY).check_output("scancel --user=researcher")


def test_a_backup_controller_goes_on_with_the_jobs_and_gives_them_back(both: None) -> None:
    running = queued("--nodelist=n1", command=until(f"{GO}-1"))
    wait_for("the job", lambda: accounts(running, "State") == "RUNNING")
    began = accounts(running, "Start")
    waiting = queued(f"--dependency=afterok:{running}", command=until(f"{GO}-2"))
    # A controller writes its state within five seconds: a backup has no newer changes.
    time.sleep(7)

    stopped(PRIMARY)
    wait_for("the backup in charge", answers, 90)
    assert sorted(as_user(f"squeue --noheader --format=%T --jobs={running},{waiting}").split()) == [
        "PENDING",
        "RUNNING",
    ]
    node(PRIMARY).check_output(f"touch {GO}-1")
    wait_for("the job's end under the backup", lambda: accounts(running, "State") == "COMPLETED")
    wait_for("the next job under the backup", lambda: accounts(waiting, "State") == "RUNNING")
    submitted = queued(command="true")
    wait_for("a job submitted to the backup", lambda: accounts(submitted, "State") == "COMPLETED")

    # The primary takes over from the backup, and no longer needs it.
    def stood_by() -> int:
        return int(node(BACKUP).check_output("grep --count 'running in background mode' /var/log/slurm/slurmctld.log"))

    before = stood_by()
    started(PRIMARY)
    wait_for("the backup standing by", lambda: stood_by() > before, 90)
    stopped(BACKUP)
    assert answers(), "the primary does not respond"
    node(PRIMARY).check_output(f"touch {GO}-2")
    wait_for("the job's end under the primary", lambda: accounts(waiting, "State") == "COMPLETED")
    assert int(queued()) > int(submitted)

    # Nothing ran twice, and the accounts are complete.
    rows = as_user(
        f"sacct --noheader --allocations --parsable2 --duplicates --jobs={running},{waiting},{submitted} "
        "--format=jobid,state,exitcode"
    )
    assert rows.splitlines() == [f"{job}|COMPLETED|0:0" for job in (running, waiting, submitted)]
    assert accounts(running, "Start") == began
    assert states() == {"n1": "idle", "n2": "idle"}
