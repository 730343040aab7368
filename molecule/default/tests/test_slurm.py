"""The SLURM tier on the nodes, from the view of a user and of a node."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import testinfra
from testinfra.host import Host

SSH_CONFIG = Path(os.environ["ICTX_LAB_STATE"]) / "ssh" / "config"
COMPUTE = ["n1", "n2"]


def node(name: str) -> Host:
    """Returns testinfra's host of a node."""
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(SSH_CONFIG))


def test_a_unit_has_the_site_s_own_settings() -> None:
    for name in COMPUTE:
        host = node(name)
        process = host.check_output("systemctl show --property=MainPID --value slurmd")
        assert "ICTX_SITE=1" in host.file(f"/proc/{process}/environ").content_string.split("\0")
    assert not node("ctl").file("/etc/systemd/system/slurmd.service.d/zz-site.conf").exists


def as_user(command: str) -> str:
    """Runs a command on the controller as an ordinary user, which must succeed; returns its output."""
    return str(node("ctl").check_output(f"runuser -l researcher -c {shlex.quote(command)}"))


@pytest.mark.parametrize(
    ("name", "service"),
    [("ctl", "munge"), ("ctl", "mariadb"), ("ctl", "slurmdbd"), ("ctl", "slurmctld")]
    + [(name, service) for name in COMPUTE for service in ("munge", "slurmd")],
)
def test_service_runs_and_starts_at_boot(name: str, service: str) -> None:
    found = node(name).service(service)
    assert found.is_running
    assert found.is_enabled


def test_a_user_sees_idle_nodes() -> None:
    states = dict(
        line.split() for line in as_user("sinfo --noheader --Node --partition=batch --format='%N %T'").splitlines()
    )
    assert states == {"n1": "idle", "n2": "idle"}


def test_a_user_runs_a_job_on_every_node_and_finds_it_in_the_accounts() -> None:
    assert sorted(as_user("srun --nodes=2 hostname").split()) == COMPUTE
    accounts = "sacct --noheader --allocations --parsable2 --format=State,NodeList --name=hostname"
    # The controller reports to the database with a delay.
    for _ in range(30):
        if found := as_user(accounts).split():
            break
        time.sleep(1)
    assert "COMPLETED|n[1-2]" in found


def test_a_job_larger_than_the_cluster_is_refused_with_a_reason() -> None:
    done = node("ctl").run("runuser -l researcher -c 'sbatch --nodes=3 --wrap=true'")
    assert done.rc != 0
    assert "Node count specification invalid" in done.stderr


def test_a_user_without_an_account_may_not_submit() -> None:
    done = node("ctl").run("runuser -u nobody -- sbatch --chdir=/tmp --wrap=true")
    assert done.rc != 0
    assert "Invalid account" in done.stderr


def test_compute_nodes_keep_no_configuration_of_their_own() -> None:
    for name in COMPUTE:
        assert not node(name).file("/etc/slurm/slurm.conf").exists
        assert node(name).file("/run/slurm/conf/slurm.conf").exists


@pytest.mark.parametrize(
    ("name", "path", "owner", "mode"),
    [
        ("ctl", "/etc/munge/munge.key", "munge", 0o400),
        ("n1", "/etc/munge/munge.key", "munge", 0o400),
        ("ctl", "/etc/slurm/slurmdbd.conf", "slurm", 0o600),
    ],
)
def test_secrets_are_private(name: str, path: str, owner: str, mode: int) -> None:
    file = node(name).file(path)
    assert (file.user, file.mode) == (owner, mode)


def test_nodes_without_a_gpu_are_left_alone() -> None:
    for name in COMPUTE:
        assert not node(name).package("nvidia-container-toolkit").is_installed


def test_job_script_says_what_the_inventory_says() -> None:
    script = node("ctl").file("/opt/ictx/jobs/pretrain.sbatch").content_string
    assert "#SBATCH --nodes=2\n" in script
    assert "gpus-per-node" not in script


def test_a_sick_node_is_drained_with_the_reason_and_resumed_once_it_is_well() -> None:
    n2, state = node("n2"), "scontrol --oneliner show node n2"
    well = n2.file("/etc/slurm/health.json").content_string
    sick = well.replace('"mounts": [', '"mounts": ["/nowhere", ')
    try:
        n2.check_output("printf %%s %s >/etc/slurm/health.json", sick)
        n2.check_output("/opt/ictx/bin/ictx-node-health")
        shown = n2.check_output(state)
        assert "DRAIN" in shown
        assert "Reason=ictx-health: /nowhere is not mounted [root@" in shown
        # A reason that somebody else set is not changed, whether the node is healthy or not.
        node("ctl").check_output("scontrol update nodename=n2 state=drain reason='new disk'")
        n2.check_output("/opt/ictx/bin/ictx-node-health")
        n2.check_output("printf %%s %s >/etc/slurm/health.json", well)
        n2.check_output("/opt/ictx/bin/ictx-node-health")
        assert "Reason=new disk [root@" in n2.check_output(state)
        node("ctl").check_output(
            "scontrol update nodename=n2 state=drain reason='ictx-health: /nowhere is not mounted'"
        )
        n2.check_output("/opt/ictx/bin/ictx-node-health")
        assert "DRAIN" not in n2.check_output(state)
    finally:
        n2.check_output("printf %%s %s >/etc/slurm/health.json", well)
        node("ctl").run("scontrol update nodename=n2 state=undrain")


def test_a_check_run_finds_nothing_to_change() -> None:
    command = ["ansible-playbook", "--check", "--inventory=inventories/lab", "--limit=slurm:localhost"]
    done = subprocess.run(
        [*command, os.environ["MOLECULE_CHECK"]],
        capture_output=True,
        text=True,
        cwd=os.environ["MOLECULE_PROJECT_DIRECTORY"],
        env={**os.environ, "ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    recap = dict(re.findall(r"^(\w+) +: ok=\d+ +changed=(\d+)", done.stdout, re.MULTILINE))
    assert recap == dict.fromkeys(["ctl", "localhost", "n1", "n2"], "0")
