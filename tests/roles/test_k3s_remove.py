"""The order in which Kubernetes nodes are removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from cluster import ROOT

KUBECTL = """\
#!/bin/sh
echo "$@" >>{log}
case "$*" in
"get nodes --output=name") printf 'node/s1\\nnode/s2\\nnode/s3\\n' ;;
"delete node --ignore-not-found s2") [ -e {log}.s2 ] || echo 'node "s2" deleted'; touch {log}.s2 ;;
esac
"""


def test_servers_leave_etcd_one_by_one_while_their_k3s_runs() -> None:
    """Two of three servers that are stopped first take the majority of etcd with them: nothing could be deleted."""
    plays = yaml.safe_load((ROOT / "playbooks/remove-k3s-node.yml").read_text())
    order = [task["name"] for play in plays for task in play["tasks"]]
    wanted = ["Drain the nodes", "Disable restarts", "Delete the nodes", "Stop K3s", "Delete its cluster state"]
    assert [name for name in order if name in wanted] == [*wanted, "Delete the nodes"]


def test_nodes_that_are_no_longer_in_the_inventory_are_drained_and_deleted(tmp_path: Path) -> None:
    (tmp_path / "kubectl").write_text(KUBECTL.format(log=tmp_path / "log"))
    (tmp_path / "kubectl").chmod(0o755)
    common = {"ansible_connection": "local", "ansible_become": False, "ansible_python_interpreter": sys.executable}
    groups = {name: {"hosts": {}} for name in ("k3s_agent", "slurm_compute", "slurm_controller", "storage_client")}
    inventory = {"all": {"vars": common, "children": groups | {"k3s_server": {"hosts": {"S1": None}}}}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(inventory))
    extra = json.dumps({"_kubectl": [str(tmp_path / "kubectl")], "nodes": "s2,s3"})
    command = ["ansible-playbook", "-i", f"{tmp_path}/hosts.yml", "playbooks/remove-k3s-node.yml", "-e", extra]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    words = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    delete = [["delete", "s2"], ["delete", "s3"]]
    assert [[each[0], each[-1]] for each in words if each[0] == "delete"] == 2 * delete
    assert [each[1] for each in words if each[0] == "drain"] == ["s2", "s3"]
