"""Upgrade to SLURM's next release in Debian's mirrors, while jobs run, wait and are queued."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import test_constraints
from nodes import COMPUTE, CONTROLLERS, accounts, as_user, changed, node, played, power_on, queued, states, wait_for

GO = "/shared/upgrade-go"
LATER = "forky"
UPGRADE = ["playbooks/upgrade.yml", "-e", f"upgrade_release={LATER}"]


def installed(name: str) -> str:
    """Returns the release of SLURM on a node, such as 24.11."""
    version = node(name).check_output("dpkg-query --showformat='${Version}' --show slurm-client")
    return ".".join(version.split(".")[:2])


def serves() -> str:
    """Returns the release that the controller reports; empty if it does not respond."""
    found = re.search(r"SLURM_VERSION\s*=\s*(\d+\.\d+)", node("ctl").run("scontrol show config").stdout)
    return found[1] if found else ""


@pytest.fixture(scope="module")
def later() -> str:
    """Adds Debian's next release to the nodes' apt sources, with low priority; returns its release of SLURM."""
    for name in (*CONTROLLERS, *COMPUTE):
        host = node(name)
        # Lists of testing are valid for a week, and a mirror may be a copy of an earlier day.
        source = rf"s/^deb \(.*\) trixie main/deb [check-valid-until=no] \1 {LATER} main/p"
        host.check_output(f"sed -n '{source}' /etc/apt/sources.list >/etc/apt/sources.list.d/later.list")
        pin = f"Package: *\\nPin: release n={LATER}\\nPin-Priority: 100\\n"
        host.check_output(f"printf '{pin}' >/etc/apt/preferences.d/later")
        host.check_output("apt-get -q update")
    table = node("ctl").check_output("apt-cache madison slurm-client")
    newest = re.search(rf"\|\s+(\d+\.\d+)\S* \| \S+ {LATER}/", table)
    assert newest, table
    return newest[1]


def history() -> set[str]:
    """Returns the completed jobs in the accounts."""
    span = "--starttime=now-1days --endtime=now --state=completed"
    fields = "jobid,user,account,start,end,exitcode"
    return set(as_user(f"sacct --noheader --allocations --parsable2 {span} --format={fields}").splitlines())


def test_a_check_run_shows_the_plan_and_changes_nothing(later: str) -> None:
    def kept() -> list[str]:
        daemons = "systemctl show --property=MainPID slurmctld slurmdbd slurmd"
        commands = ("dpkg-query --show", daemons, "cat /etc/slurm/slurm.conf", "ls /var/backups")
        return [node(name).run(command).stdout for name in (*CONTROLLERS, *COMPUTE) for command in commands]

    before = kept()
    assert f"SLURM {installed('ctl')}." in (plan := " ".join(played(*UPGRADE, "--check").split()))
    assert re.search(rf"SLURM \S+ → {later}\.", plan)
    assert kept() == before
    assert states() == {"n1": "idle", "n2": "idle"}


def test_a_batch_that_fails_stops_the_upgrade_and_the_same_command_completes_it(later: str) -> None:
    before = installed("ctl")
    assert before != later
    node("ctl").check_output(f"rm -f {GO}")
    as_user("srun --mem=50 hostname")
    wait_for("the job in the accounts", lambda: bool(history()))
    had = history()
    running = queued("--nodelist=n2", command=f"until [ -e {GO} ]; do sleep 1; done")
    wait_for("the job", lambda: accounts(running, "State") == "RUNNING")
    began = accounts(running, "Start")
    array = queued("--array=1-6%2", command="sleep 15")
    after = queued(f"--dependency=afterok:{running}")
    held = queued("--hold")

    # The new controllers, then the first node, whose validation fails.
    stopped = " ".join(played(*UPGRADE, "-e", "validate_command=false", "-e", "wait_minutes=5", status=2).split())
    assert "n1 stays drained; later batches were not started" in stopped
    assert [installed(name) for name in (*CONTROLLERS, *COMPUTE)] == [later, later, later, before]
    assert serves() == later
    reason = node("ctl").check_output("scontrol --oneliner show node n1")
    assert "DRAIN" in reason
    assert "Reason=upgrade.yml failed: " in reason
    # An older slurmd under the new controller: running jobs continue.
    assert states()["n2"] in ("mixed", "allocated")
    assert accounts(running, "State,Start") == f"RUNNING|{began}"

    with ThreadPoolExecutor() as other:
        rest = other.submit(played, *UPGRADE, "-e", "wait_minutes=10")
        wait_for("n2 drained", lambda: states()["n2"] == "draining", 600)
        node("ctl").check_output(f"touch {GO}")
        rest.result()
    assert {installed(name) for name in (*CONTROLLERS, *COMPUTE)} == {later}
    as_user(f"scontrol release {held}")
    for job in (running, after, held):
        wait_for(f"job {job}", lambda job=job: accounts(job, "State") == "COMPLETED")
    assert accounts(running, "State,Start,ExitCode") == f"COMPLETED|{began}|0:0"
    wait_for("the array", lambda: accounts(array, "State").split() == ["COMPLETED"] * 6)
    restarts = "sacct --noheader --allocations --parsable2 --duplicates --format=jobid --jobs="
    assert len(as_user(f"{restarts}{running},{array}").split()) == 7, "a job was requeued"
    assert had <= history()
    assert states() == {"n1": "idle", "n2": "idle"}


def test_a_second_upgrade_changes_nothing(later: str) -> None:
    again = played(*UPGRADE)
    assert "nothing newer" in again
    assert changed(again) == 0


def test_a_node_that_asks_for_it_is_restarted_before_its_validation(later: str) -> None:
    def booted(name: str) -> str:
        return node(name).check_output("cut --delimiter=' ' --fields=22 /proc/1/stat")

    before = {name: booted(name) for name in COMPUTE}
    node("n2").check_output("touch /run/reboot-required")
    with ThreadPoolExecutor() as other:
        power = other.submit(power_on, "n2")
        output = played(*UPGRADE, "-e", "upgrade_everything=true")
        power.result()
    assert [name for name in COMPUTE if booted(name) != before[name]] == ["n2"]
    # Its batch is the last: the validation job ran there after the restart.
    assert output.index("TASK [Restart the machine]") < output.rindex("TASK [Run the job]")
    assert states() == {"n1": "idle", "n2": "idle"}
    assert as_user("srun --mem=50 --nodelist=n2 hostname") == "n2"


def test_what_cgroups_enforce_holds_in_the_new_release(later: str) -> None:
    test_constraints.test_a_job_that_takes_more_memory_than_it_asked_for_is_killed()
    test_constraints.test_each_job_has_a_tmp_of_its_own_which_is_gone_with_it()
