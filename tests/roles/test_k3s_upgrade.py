"""The upgrade of one Kubernetes node, with stand-ins for kubectl and the role k3s."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.template import Templar
from cluster import ROOT, Cluster, trusted

OLD, NEW = "v1.34.1+k3s1", "v1.34.2+k3s1"
MARK = "ictx/out-of-service"
KUBECTL = """\
#!/bin/sh
echo "$@" >>{log}
case $1 in get) printf %s "True {release}" ;; drain) exit {drained} ;; esac
"""


def upgraded(folder: Path, mine: dict[str, bool], *, drained: bool = True, release: str = NEW) -> tuple[list[str], str]:
    """Returns the commands of kubectl during the upgrade of a node, and the output of Ansible."""
    role = folder / "roles/k3s/tasks/main.yml"
    role.parent.mkdir(parents=True)
    role.write_text("- ansible.builtin.command: {argv: [sh, -c, 'echo upgrade >>%s']}\n" % (folder / "log"))
    program = folder / "kubectl"
    program.write_text(KUBECTL.format(log=folder / "log", release=release, drained=0 if drained else 1))
    program.chmod(0o755)
    facts = {"k3s_upgrade_from": OLD, "k3s_upgrade_to": NEW, "k3s_upgrade_mine": mine, "_kubectl": [str(program)]}
    tasks = [{"include_tasks": str(ROOT / "playbooks/tasks/upgrade_k3s_node.yml")}]
    (folder / "play.yml").write_text(yaml.safe_dump([{"hosts": "k3s_server", "gather_facts": False, "tasks": tasks}]))
    variables = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    children = {"k3s_server": {"hosts": {"S1": None}}, "slurm_compute": {}}
    (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"vars": variables, "children": children}}))
    done = subprocess.run(
        ["ansible-playbook", "-i", f"{folder}/hosts.yml", f"{folder}/play.yml", "-e", json.dumps(facts)],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_ROLES_PATH": str(folder / "roles")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if drained else 2), done.stdout + done.stderr
    return (folder / "log").read_text().splitlines(), " ".join(done.stdout.split())


OWN, OTHERS = ({"slurm": False, "kubernetes": own, "unfinished": False} for own in (True, False))
DRAIN = "drain s1 --ignore-daemonsets --delete-emptydir-data --timeout=600s"
CORDON = f"annotate --overwrite node s1 {MARK}=upgrade-k3s.yml: to {NEW}"
UNCORDON = ["uncordon s1", f"annotate node s1 {MARK}-"]


def test_an_upgraded_node_is_uncordoned_and_its_reason_removed(tmp_path: Path) -> None:
    assert upgraded(tmp_path, OWN)[0] == [CORDON, DRAIN, "upgrade", *UNCORDON]


def test_a_node_that_was_cordoned_or_lent_before_stays_cordoned_with_its_reason(tmp_path: Path) -> None:
    assert upgraded(tmp_path, OTHERS)[0] == [DRAIN, "upgrade"]


@pytest.mark.parametrize("mine", [OWN, OTHERS])
def test_the_same_is_true_of_a_node_that_cannot_be_drained(tmp_path: Path, mine: dict[str, bool]) -> None:
    commands, text = upgraded(tmp_path, mine, drained=False, release=OLD)
    assert [words for words in commands if not words.startswith("get ")][1 + mine["kubernetes"] :] == (
        UNCORDON if mine["kubernetes"] else []
    )
    assert f"S1 runs {OLD}" in text


@pytest.mark.parametrize(
    ("unschedulable", "reason", "resumed", "unfinished"),
    [
        (False, "", True, False),
        (True, "", False, False),
        (True, "lend.yml: lent to SLURM", False, False),
        (True, f"upgrade-k3s.yml: to {NEW}", True, True),  # a failed upgrade, whose binary may be installed already
    ],
)
def test_what_is_resumed_and_what_is_finished(
    unschedulable: bool, reason: str, resumed: bool, unfinished: bool
) -> None:
    playbook = yaml.safe_load((ROOT / "playbooks/upgrade-k3s.yml").read_text())
    (text,) = (
        task["ansible.builtin.set_fact"]["k3s_upgrade_mine"]
        for task in playbook[0]["tasks"]
        if "k3s_upgrade_mine" in task.get("ansible.builtin.set_fact", {})
    )
    node: dict[str, Any] = {"metadata": {"name": "s1"}, "spec": {}}
    if unschedulable:
        node["spec"] = {"unschedulable": True}
    if reason:
        node["metadata"]["annotations"] = {MARK: reason}
    variables = {"inventory_hostname": "S1", "upgrade_nodes": {"stdout": json.dumps({"items": [node]})}}
    found = Templar(Cluster(ROOT / "inventories/lab").loader, variables=variables).template(trusted(text))
    assert (found["kubernetes"], found["unfinished"]) == (resumed, unfinished)
