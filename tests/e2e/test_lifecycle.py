"""The lifecycle playbooks on the running lab: nodes are added, removed and lost while jobs run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from lab import ROOT, Lab, wait_for
from programs import loaded

pytestmark = pytest.mark.lab

dashboards = loaded(ROOT / "scripts/dashboards")
THIRD = ["-i", "inventories/lab", "-i", "tests/e2e/third_node.yml"]
GO = "/shared/runs/researcher/lifecycle-go"
PREFIX = os.environ.get("ICTX_LAB_NAME", "ictx")


def played(*arguments: str, status: int = 0) -> str:
    """Runs ansible-playbook as a user does; returns its output."""
    command = [ROOT / ".venv/bin/ansible-playbook", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == status, done.stdout[-4000:] + done.stderr[-1000:]
    return done.stdout + done.stderr


def changed(output: str) -> int:
    """Returns the number of changed tasks."""
    return sum(int(number) for number in re.findall(r" changed=(\d+) ", output))


def states(lab: Lab) -> dict[str, str]:
    """Returns the state of each node."""
    lines = lab.run("ctl", "sinfo --noheader --Node --format='%N %T' --partition=batch").stdout.splitlines()
    return dict(line.split() for line in lines)


def waiting(lab: Lab, node: str, file: str) -> str:
    """Submits a job that occupies one core of a node until a file exists; returns its number when it runs."""
    command = f"srun sh -c 'until [ -e {file} ]; do sleep 1; done'"
    job = lab.user(
        f"cd /tmp && rm -f {file} && sbatch --parsable --nodelist={node} --ntasks=1 --mem=100 --output=/dev/null "
        f"--wrap={shlex.quote(command)}"
    )
    wait_for(f"job {job} on {node}", lambda: lab.user(f"squeue --noheader --format=%T --jobs={job}") == "RUNNING", 90)
    return job


def scraped() -> set[str]:
    """Returns the nodes that Prometheus scrapes."""
    return {series["metric"]["node"] for series in dashboards.Prometheus.of_lab().instant('up{job="node"}')}


def test_a_node_is_drained_and_resumed_and_the_second_time_nothing_changes(lab: Lab) -> None:
    drain = ["playbooks/drain.yml", "-e", "nodes=n2", "-e"]
    try:
        assert changed(played(*drain, 'reason="a fan, is noisy"', "-e", "wait_minutes=1")) == 1
        assert changed(played(*drain, "reason=other")) == 0
        assert states(lab)["n2"] == "drained"
        assert "Reason=a fan, is noisy [root@" in lab.run("ctl", "scontrol --oneliner show node n2").stdout
        refused = played("playbooks/drain.yml", "-e", "nodes=n[2,9]", "-e", "reason=x", status=2)
        assert "n9: no such node; known nodes: n1, n2, kube1; nothing was changed" in " ".join(refused.split())
    finally:
        assert changed(played("playbooks/resume.yml", "-e", "nodes=n[1-2]")) == 1
    assert changed(played("playbooks/resume.yml", "-e", "nodes=n2")) == 0
    assert states(lab) == {"n1": "idle", "n2": "idle"}


@pytest.fixture
def third(lab: Lab) -> Iterator[str]:
    """Starts a third machine, not yet part of the cluster; removes it afterwards, also from SLURM and Prometheus."""
    played(*THIRD, "playbooks/lab.yml")
    yield "n3"
    lab.run("ctl", "scancel --user=researcher")
    played("playbooks/remove-node.yml", "-e", "wait_minutes=3")
    subprocess.run(["podman", "rm", "--force", "--time=5", f"{PREFIX}-n3"], check=True, capture_output=True)
    played("playbooks/lab.yml")


@pytest.mark.full
def test_a_node_is_added_and_removed_while_jobs_run(lab: Lab, third: str) -> None:
    on_n1 = waiting(lab, "n1", f"{GO}-n1")
    began = lab.accounts(on_n1, "Start")

    assert third in re.findall(r"new nodes: (\w+)", played(*THIRD, "playbooks/add-node.yml"))
    assert states(lab)[third] == "idle"
    # As root, since users do not see root's jobs.
    validated = "sacct --allusers --noheader --allocations --format=nodelist%20,state --name=ictx-validate"
    assert [third, "COMPLETED"] in [line.split() for line in lab.run("ctl", validated).stdout.splitlines()]
    wait_for("the node in Prometheus", lambda: third in scraped(), 90)
    on_third = waiting(lab, third, f"{GO}-{third}")

    # With the inventory without the node, slurm.yml refuses while the node has a job.
    refused = " ".join(played("playbooks/slurm.yml", status=2).split())
    assert f"SLURM has jobs there ({on_third}): run playbooks/remove-node.yml, which waits for them" in refused
    assert third in states(lab)
    slip = " ".join(played("playbooks/remove-node.yml", "-e", "nodes=n2", status=2).split())
    assert f"that are not in slurm_compute are: {third}" in slip

    with ThreadPoolExecutor() as other:
        removal = other.submit(played, "playbooks/remove-node.yml", "-e", f"nodes={third}", "-e", "wait_minutes=5")
        wait_for("the node drained", lambda: states(lab)[third] == "draining", 90)
        lab.user(f"touch {GO}-{third}")
        removal.result()
    assert lab.accounts(on_third, "State,ExitCode") == "COMPLETED|0:0"
    assert set(states(lab)) == {"n1", "n2"}
    wait_for("the node out of Prometheus", lambda: third not in scraped(), 400)
    assert changed(played("playbooks/remove-node.yml")) == 0
    assert lab.accounts(on_n1, "State,Start") == f"RUNNING|{began}"
    assert lab.restarts(on_n1) == 0
    lab.user(f"touch {GO}-n1")


@pytest.fixture
def dead(lab: Lab) -> Iterator[str]:
    """Pauses n2, so that it does not respond."""
    node = f"{PREFIX}-n2"
    subprocess.run(["podman", "pause", node], check=True, capture_output=True)
    yield "n2"
    subprocess.run(["podman", "unpause", node], check=True, capture_output=True)
    wait_for("n2 in service", lambda: states(lab).get("n2") == "idle", 120)


@pytest.mark.full
def test_site_goes_on_without_a_node_that_is_dead(lab: Lab, dead: str) -> None:
    def kept() -> str:
        files = {"ctl": "/etc/slurm/slurm.conf /etc/slurm/gres.conf", "svc1": "/etc/prometheus/targets/*"}
        return "".join(lab.run(node, f"sha256sum {names}").stdout for node, names in files.items())

    before, job = kept(), waiting(lab, "n1", GO)
    refused = played("playbooks/preflight.yml", status=2)
    assert f"host {dead} ({lab.address(dead)}): cannot be reached" in " ".join(refused.split())

    output = played("site.yml", "-e", "ictx_skip_unreachable=true")
    assert f"left out, because they cannot be reached: {dead}" in output
    assert re.search(r"^n1 .* failed=0 ", output, re.MULTILINE)
    assert kept() == before
    assert lab.accounts(job, "State") == "RUNNING"
    lab.user(f"touch {GO}")


@pytest.fixture
def later(lab: Lab) -> Iterator[str]:
    """Adds Debian's next release to the apt sources of SLURM's nodes, with a priority that installs nothing from it."""
    source = "/etc/apt/sources.list.d/later.list"
    nodes = ("ctl", "n1", "n2")
    for node in nodes:
        # From the mirror of the node's own packages.
        lab.run(node, f"sed -n 's/ bookworm main/ trixie main/p' /etc/apt/sources.list >{source}")
        lab.run(
            node, "printf 'Package: *\\nPin: release n=trixie\\nPin-Priority: 100\\n' >/etc/apt/preferences.d/later"
        )
    yield "trixie"
    for node in nodes:
        lab.run(node, f"rm -f {source} /etc/apt/preferences.d/later && apt-get update")


@pytest.mark.full
def test_an_upgrade_that_would_lose_the_queue_is_refused_and_changes_nothing(lab: Lab, later: str) -> None:
    def installed() -> str:
        return "".join(lab.run(node, "dpkg-query --show 'slurm*' libc6").stdout for node in ("ctl", "n1", "n2"))

    before, job = installed(), waiting(lab, "n1", GO)
    assert "22.05.8" in before
    refused = " ".join(played("playbooks/upgrade.yml", "-e", f"upgrade_release={later}", status=2).split())
    assert "cannot be upgraded to 24.11.5" in refused
    assert "Upgrade to 23.02 or 23.11 first" in refused
    assert installed() == before
    assert lab.accounts(job, "State") == "RUNNING"
    assert states(lab)["n2"] == "idle"
    lab.user(f"touch {GO}")


@pytest.mark.full
def test_an_upgrade_to_what_is_installed_changes_nothing(lab: Lab) -> None:
    output = played("playbooks/upgrade.yml")
    assert "nothing newer" in output
    assert changed(output) == 0
