"""Files of K3s's servers during a restore of Kubernetes: the tasks of the playbook, in a folder of the test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from cluster import ROOT
from programs import play

PLAYS = {each["name"]: each for each in yaml.safe_load((ROOT / "playbooks/restore-k3s.yml").read_text())}
FILES = ("db/etcd/member", "db/reset-flag", "cred/passwd", "tls/server-ca.key")


@pytest.mark.parametrize("restored", [True, False])
def test_a_server_gets_certificates_and_credentials_from_the_restored_one(tmp_path: Path, restored: bool) -> None:
    """K3s exits on files that are newer than those of its datastore ("could cause a cluster outage")."""
    server = tmp_path / "k3s/server"
    for name in FILES:
        (server / name).parent.mkdir(parents=True, exist_ok=True)
        (server / name).write_text(name)
    moving = [
        task
        for task in PLAYS["Restore"]["tasks"]
        if "/var/lib/rancher/k3s/server" in str(task) and "cluster-reset" not in str(task)
    ]
    text = yaml.safe_dump(moving).replace("/var/lib/rancher", str(tmp_path))
    variables = {"_is_from": restored, "ansible_python_interpreter": sys.executable}
    done = play(tmp_path, yaml.safe_load(text), variables)
    assert done.returncode == 0, done.stdout + done.stderr
    here = {path.name for path in server.iterdir()}
    assert {name.split(".")[0] for name in here} == {"db", "cred", "tls"}
    assert ({"cred", "tls"} <= here, "db" in here) == (restored, restored)
    assert sorted(path.name.split("-")[0] for path in server.glob("*.before-*/*")) == sorted(
        ["etcd", "reset"] + ([] if restored else ["passwd", "server"])
    )
    assert not (server / "db/reset-flag").exists(), "K3s refuses a second restore while it exists"


def test_agents_are_restarted_last() -> None:
    name, last = list(PLAYS.items())[-1]
    assert (name, last["hosts"]) == ("Restart the agents", "k3s_agent")
