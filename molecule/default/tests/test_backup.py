"""Backups of a real SLURM: its accounting database and its controller's state are lost, and restored."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator

import pytest
from test_slurm import as_user, node

PROGRAM = "/opt/ictx/bin/ictx-backup"


def restore(*settings: str) -> subprocess.CompletedProcess[str]:
    """Runs the playbook restore.yml."""
    extra = [word for setting in settings for word in ("-e", setting)]
    return subprocess.run(
        ["ansible-playbook", "--inventory=inventories/lab", "playbooks/restore.yml", *extra],
        capture_output=True,
        text=True,
        cwd=os.environ["MOLECULE_PROJECT_DIRECTORY"],
        env={**os.environ, "ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"},
        check=False,
    )


def accounts() -> list[str]:
    """Returns SLURM's accounts; retries, because slurmdbd does not respond immediately after its start."""
    for _ in range(30):
        done = node("ctl").run("sacctmgr --noheader --parsable2 list account format=account")
        if done.rc == 0 and done.stdout:
            return str(done.stdout).split()
        time.sleep(1)
    raise AssertionError(done.stderr)


def accounted() -> dict[str, list[str]]:
    """Returns the content of the database: users, associations with limits, QOS and all jobs."""
    commands = {
        "users": "sacctmgr list user format=user,defaultaccount,adminlevel",
        "associations": "sacctmgr list association format=cluster,account,user,qos,fairshare,maxjobs",
        "qos": "sacctmgr list qos format=name,priority,maxsubmitpu,gracetime",
        "jobs": "sacct --allusers --starttime=now-7days --endtime=now "
        "--format=jobid,jobname,user,account,state,exitcode,start,end",
    }
    rows = {name: f"{command} --noheader --parsable2" for name, command in commands.items()}
    return {name: sorted(node("ctl").check_output(command).splitlines()) for name, command in rows.items()}


@pytest.fixture
def kept() -> Iterator[dict[str, list[str]]]:
    """Adds an account, a limit and a job to the database; returns its content."""
    node("ctl").check_output("sacctmgr --immediate add account kept description=kept organization=kept")
    node("ctl").check_output("sacctmgr --immediate modify user researcher set maxjobs=77")
    as_user("srun --job-name=kept true")
    ended = "sacct --noheader --allusers --name=kept --state=completed --starttime=now-1hours --endtime=now"
    node("ctl").check_output(f"timeout 60 sh -c 'until {ended} | grep -q COMPLETED; do sleep 1; done'")
    found = accounted()
    assert any("|kept|researcher|" in row for row in found["jobs"])
    assert any("|researcher|" in row and row.endswith("|77") for row in found["associations"])
    yield found
    node("ctl").check_output("sacctmgr --immediate modify user researcher set maxjobs=-1")
    node("ctl").check_output("sacctmgr --immediate delete account kept")


def jobs() -> dict[str, str]:
    """Returns the state of each job in the queue, by its name."""
    node("ctl").check_output("timeout 60 sh -c 'until scontrol ping | grep -q UP; do sleep 1; done'")
    return dict(line.split() for line in as_user("squeue --noheader --format='%j %T'").splitlines())


def test_a_timer_makes_backups_every_night() -> None:
    timer = node("ctl").service("ictx-backup.timer")
    assert timer.is_running
    assert timer.is_enabled
    for name in ("n1", "n2"):
        assert not node(name).file(PROGRAM).exists, "compute nodes have nothing to save"


def test_only_root_reads_backups_and_their_password() -> None:
    for path in ("/etc/ictx/backup", "/shared/backup", "/shared/backup/ctl", "/var/lib/ictx-backup"):
        assert node("ctl").file(path).mode == 0o700, path
    assert node("ctl").file("/etc/ictx/backup/password").mode == 0o600


def test_a_lost_database_comes_back_with_users_associations_and_history(kept: dict[str, list[str]]) -> None:
    node("ctl").check_output("systemctl start ictx-backup")
    node("ctl").check_output("systemctl stop slurmdbd && mariadb --execute='drop database slurm_acct_db'")
    node("ctl").check_output("systemctl start slurmdbd")
    assert "kept" not in accounts(), "slurmdbd created an empty database"
    done = restore("restore_what=accounting")
    assert done.returncode == 0, done.stdout[-3000:]
    assert {"kept", "ictx", "root"} <= set(accounts())
    assert accounted() == kept
    assert "researcher" in as_user("srun --job-name=after whoami"), "the controller does not have the associations"
    assert "accounting-before-restore" in node("ctl").check_output(f"{PROGRAM} restic snapshots")


def test_a_lost_queue_comes_back() -> None:
    as_user("sbatch --hold --job-name=kept --wrap=true")
    # The controller writes its state within five seconds.
    time.sleep(7)
    node("ctl").check_output("systemctl start ictx-backup")
    as_user("scancel --name=kept")
    node("ctl").check_output("systemctl stop slurmctld && find /var/lib/slurm/slurmctld -type f -delete")
    done = restore("restore_what=slurm-state")
    assert done.returncode == 0, done.stdout[-3000:]
    said = " ".join(done.stdout.split())
    assert re.search(r"slurm/slurmctld as it was before is /var/lib/slurm/slurmctld[.]before-\d+", said)
    assert jobs()["kept"] == "PENDING"
    as_user("scancel --name=kept")
    node("ctl").check_output("rm -r /var/lib/slurm/slurmctld.before-*")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], 'restore_what is "": set -e restore_what= to one of accounting, slurm-state'),
        (["restore_what=accounting", "restore_snapshot=deadbeef"], "nothing was restored, and slurmdbd runs as before"),
    ],
)
def test_a_restore_of_what_is_not_there_changes_nothing(settings: list[str], message: str) -> None:
    done = restore(*settings)
    assert done.returncode != 0
    assert message in " ".join(done.stdout.split())
    assert {"ictx", "root"} <= set(accounts())


def test_a_run_that_was_killed_is_no_hindrance() -> None:
    for seconds in (0.5, 2):
        command = f"systemctl start --no-block ictx-backup; sleep {seconds}; systemctl kill --signal=KILL ictx-backup"
        node("ctl").run(f"sh -c {shlex.quote(command)}")
        time.sleep(0.5)
    node("ctl").check_output("systemctl start ictx-backup")
    assert node("ctl").check_output("ls /shared/backup/ctl/locks /var/lib/ictx-backup/dumps | grep -v : || true") == ""


def test_a_database_that_is_down_is_a_failed_unit_that_says_why() -> None:
    node("ctl").check_output("systemctl stop mariadb")
    try:
        assert node("ctl").run("systemctl start ictx-backup").rc != 0
        log = node("ctl").check_output("journalctl --no-pager --unit=ictx-backup --lines=20")
        assert "accounting: mariadb-dump of slurm_acct_db ended with" in log
    finally:
        node("ctl").check_output("systemctl start mariadb")
    node("ctl").check_output("systemctl start ictx-backup")
