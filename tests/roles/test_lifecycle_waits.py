"""Playbooks that drain nodes reject inventories without their groups, and times for which they would not wait."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT

GROUPS: dict[str, Any] = {
    "slurm_controller": {"hosts": {"ctl": None}},
    "slurm_compute": {"hosts": {"gpu1": None}},
    "slurm": {"children": {"slurm_controller": None, "slurm_compute": None}},
    "storage_client": {"children": {"slurm": None}},
    "k3s_server": {"hosts": {"kube1": None}},
    "k3s_agent": {"hosts": {"gpu1": None}},
}
# Playbooks that wait for jobs, with their other variables.
WAITING: dict[str, dict[str, str]] = {
    "lend": {"nodes": "gpu1", "to": "kubernetes"},
    "maintain": {"change": "restart"},
    "remove-node": {},
    "upgrade": {},
    "upgrade-k3s": {"k3s_version": "v1.35.2+k3s1"},
}
DRAIN = {"nodes": "gpu1", "reason": "test"}
CHECKS = {
    "Gathering Facts",
    "Validate that the groups exist",
    "Validate the minutes to wait",
    "Validate the sizes of batches",
}
OTHERS: dict[str, dict[str, str]] = {"drain": DRAIN, "remove-k3s-node": {}, "resume": {"nodes": "gpu1"}, "validate": {}}


def failed(folder: Path, playbook: str, groups: dict[str, Any] = GROUPS, **variables: object) -> tuple[set[str], str]:
    """Runs a playbook that fails; returns its tasks, and its output in one line."""
    local = {"ansible_connection": "local", "ansible_become": False, "ansible_python_interpreter": sys.executable}
    (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"vars": local, "children": groups}}))
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(folder / "hosts.yml")]
    done = subprocess.run(
        [*command, str(ROOT / f"playbooks/{playbook}.yml"), "--extra-vars", json.dumps(variables)],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_HOME": str(folder), "ANSIBLE_CACHE_PLUGIN": "memory"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    return set(re.findall(r"^TASK \[(.*)\]", done.stdout, re.MULTILINE)), " ".join((done.stdout + done.stderr).split())


def refused(folder: Path, playbook: str, groups: dict[str, Any] = GROUPS, **variables: object) -> str:
    """Runs a playbook that fails in its first checks; returns its output in one line."""
    tasks, printed = failed(folder, playbook, groups, **variables)
    assert tasks <= CHECKS
    return printed


@pytest.mark.parametrize(
    ("playbook", "minutes"),
    [*((each, value) for each in WAITING for value in (0, "2h")), ("lend", -1), ("upgrade", "0.0")],
)
def test_no_playbook_goes_on_without_waiting_for_jobs(tmp_path: Path, playbook: str, minutes: object) -> None:
    printed = refused(tmp_path, playbook, **WAITING[playbook], wait_minutes=minutes)
    assert f"wait_minutes is {minutes}: set it to a number above 0; nothing was changed" in printed


@pytest.mark.parametrize("minutes", ["2h", -1])
def test_no_node_is_drained_with_a_time_that_is_no_number(tmp_path: Path, minutes: object) -> None:
    printed = refused(tmp_path, "drain", **DRAIN, wait_minutes=minutes)
    assert f"wait_minutes is {minutes}: set it to a number of minutes; nothing was changed" in printed


def test_nodes_may_be_drained_without_waiting(tmp_path: Path) -> None:
    tasks, printed = failed(tmp_path, "drain", nodes="gpu1", reason="", wait_minutes=0)
    assert tasks > CHECKS - {"Gathering Facts"}
    assert "reason is empty" in printed


@pytest.mark.parametrize("playbook", ["upgrade-k3s", "remove-k3s-node"])
def test_no_eviction_waits_without_limit(tmp_path: Path, playbook: str) -> None:
    printed = refused(tmp_path, playbook, k3s_version="v1.35.2+k3s1", evict_minutes=0)
    assert "evict_minutes is 0: set it to a number above 0; nothing was changed" in printed


@pytest.mark.parametrize(
    ("playbook", "name", "size"),
    [("maintain", "maintain_batch", 0), ("upgrade", "upgrade_batch", "0%"), ("upgrade-k3s", "upgrade_batch", [1, -1])],
)
def test_no_batch_has_all_nodes_by_mistake(tmp_path: Path, playbook: str, name: str, size: Any) -> None:
    printed = refused(tmp_path, playbook, **WAITING[playbook], **{name: size})
    shown = ", ".join(map(str, size)) if isinstance(size, list) else size
    assert f"{name} is {shown}: set it to a number of nodes above 0, or to a percentage such as 10%" in printed


@pytest.mark.parametrize("size", [2, "10%", [1, "50%"]])
def test_batches_may_be_numbers_percentages_and_lists(tmp_path: Path, size: Any) -> None:
    tasks, printed = failed(tmp_path, "maintain", change="nothing", maintain_batch=size)
    assert tasks > CHECKS - {"Gathering Facts"}
    assert "give -e change=driver" in printed


@pytest.mark.parametrize("playbook", [*WAITING, *OTHERS])
def test_a_missing_group_is_named_before_anything_is_changed(tmp_path: Path, playbook: str) -> None:
    groups = {name: hosts for name, hosts in GROUPS.items() if name not in ("k3s_agent", "storage_client")}
    printed = refused(tmp_path, playbook, groups, **(WAITING | OTHERS)[playbook])
    assert (
        "groups missing from the inventory: k3s_agent, storage_client: add them, empty if there are no such" in printed
    )
