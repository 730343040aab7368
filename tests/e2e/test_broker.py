"""A node of both SLURM and Kubernetes: maintenance, and lending from one to the other; acceptance of all nodes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import STATE, Lab
from test_lifecycle import changed, played, states

pytestmark = [pytest.mark.lab, pytest.mark.full]

BOTH = ["-i", "inventories/lab", "-i", "tests/e2e/both.yml"]
NODE = ["-e", "nodes=kube1"]


@pytest.fixture(scope="module")
def both(lab: Lab) -> Iterator[str]:
    """Adds the lab's Kubernetes node to SLURM, and removes it afterwards."""
    played(*BOTH, "playbooks/add-node.yml")
    yield "kube1"
    played(*BOTH, "playbooks/resume.yml", *NODE)
    uncordon = ["kubectl", f"--kubeconfig={STATE}/kubeconfig", "uncordon", "kube1"]
    subprocess.run(uncordon, check=True, capture_output=True)
    played("playbooks/remove-node.yml", "-e", "wait_minutes=3")


def kubernetes(node: str) -> tuple[bool, str]:
    """Returns whether a node is cordoned, and the reason."""
    command = ["kubectl", f"--kubeconfig={STATE}/kubeconfig", "get", "node", node, "--output=json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    annotations = found["metadata"].get("annotations", {})
    return found["spec"].get("unschedulable", False), annotations.get("ictx/out-of-service", "")


def slurm_reason(lab: Lab, node: str) -> str:
    """Returns the reason of a drained node."""
    return lab.run("ctl", f"scontrol --oneliner show node {node} | grep -o 'Reason=.*'").stdout.strip()


def test_a_node_of_both_is_maintained_out_of_both_and_one_that_fails_stays_out(lab: Lab, both: str) -> None:
    maintain = [*BOTH, "playbooks/maintain.yml", *NODE, "-e", "change=driver"]
    done = played(*maintain)
    assert "Run the pod" in done
    assert "Run the job" in done
    assert (states(lab)[both], kubernetes(both)) == ("idle", (False, ""))

    failed = " ".join(played(*maintain, "-e", "validate_command='echo no GPU; false'", status=2).split())
    assert "kube1 stays drained" in failed
    assert "no GPU" in failed
    assert states(lab)[both] == "drained"
    assert "maintain.yml failed: the pod is Failed: " in slurm_reason(lab, both)
    cordoned, reason = kubernetes(both)
    assert cordoned
    assert reason.startswith("maintain.yml failed: the pod is Failed: ")

    # The same command resumes where that run failed.
    played(*maintain)
    assert (states(lab)[both], kubernetes(both)) == ("idle", (False, ""))


def test_a_node_is_lent_back_and_forth_and_serves_one_at_a_time(lab: Lab, both: str) -> None:
    def lend(to: str, *words: str) -> str:
        return played(*BOTH, "playbooks/lend.yml", *NODE, "-e", f"to={to}", *words)

    lend("kubernetes")
    assert states(lab)[both] == "drained"
    assert kubernetes(both) == (False, "")
    assert changed(lend("kubernetes")) == 0
    # playbooks/resume.yml does not put a lent node into service of both.
    assert changed(played(*BOTH, "playbooks/resume.yml", *NODE)) == 0
    assert changed(lend("slurm", "--check")) > 0
    assert (states(lab)[both], kubernetes(both)) == ("drained", (False, ""))

    lend("slurm")
    assert states(lab)[both] == "idle"
    assert kubernetes(both) == (True, "lend.yml: lent to SLURM")
    assert lab.user(f"srun --nodelist={both} hostname")
    assert changed(lend("slurm")) == 0
    played(*BOTH, "playbooks/resume.yml", *NODE)
    assert kubernetes(both)[0]
    lend("kubernetes")
    assert kubernetes(both) == (False, "")


def test_all_nodes_are_accepted_and_a_threshold_that_is_not_reached_is_named(lab: Lab, tmp_path: Path) -> None:
    validate = ["playbooks/validate.yml", "-e", f"validate_report_dir={tmp_path}", "-e", "validate_size_mb=16"]
    played(*validate)
    report = json.loads((tmp_path / "validate.json").read_text())
    assert report["passed"] is True
    assert report["links"]["nodes"] == ["n1", "n2"]
    assert report["links"]["backend"] == "gloo"
    (pair,) = report["links"]["pairs"]
    assert pair[:2] == ["n1", "n2"]
    names = {line["check"] for line in report["checks"]}
    assert {"pod", "write /var/tmp", "job in a container on all nodes", "clock, beside n1's"} <= names
    assert "<svg" in (tmp_path / "validate.html").read_text()

    wanted = json.dumps({"ictx_validate": {"pair_gb_s": 1e6}})
    refused = " ".join(played(*validate, "-e", wanted, status=2).split())
    assert "n1 n2: all-reduce of the pair: " in refused
    assert "threshold ≥ 1e+06 GB/s" in refused
