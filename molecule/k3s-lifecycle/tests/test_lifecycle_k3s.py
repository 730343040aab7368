"""Life cycle of a K3s cluster. Each test continues from the state after the previous one, in the order of the file."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import testinfra
import yaml
from testinfra.host import Host

STATE = Path(os.environ["ICTX_LAB_STATE"])
SHARED = STATE / "shared"
PLAYBOOKS = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"]) / "playbooks"
SERVERS = ["s1", "s2", "s3"]
NODES = [*SERVERS, "a1"]
OLD, NEW, FAR = "v1.34.1+k3s1", "v1.35.1+k3s1", "v1.36.0+k3s1"
PODS = "k3s kubectl"


def node(name: str) -> Host:
    """Returns testinfra's host of a node."""
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(STATE / "ssh/config"))


def play(playbook: str, *arguments: str, groups: dict[str, list[str]] | None = None) -> tuple[int, str]:
    """Runs a playbook; returns status and output.

    Args:
        groups: hosts of groups, read before the inventory: they set the order of hosts, and may add hosts.
    """
    more = STATE / "more.yml"
    more.write_text(
        yaml.safe_dump(
            {name: {"hosts": dict.fromkeys(hosts)} for name, hosts in (groups or {}).items()}, sort_keys=False
        )
    )
    command = [
        "ansible-playbook",
        "-i",
        str(more),
        "-i",
        os.environ["MOLECULE_INVENTORY"],
        str(PLAYBOOKS / playbook),
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def succeeds(playbook: str, *arguments: str, groups: dict[str, list[str]] | None = None) -> str:
    """Runs a playbook, which must succeed; returns its output."""
    status, text = play(playbook, *arguments, groups=groups)
    assert status == 0, text[-4000:]
    return text


def records() -> list[dict[str, Any]]:
    """Returns the events of the nodes, in order."""
    return [json.loads(line) for line in (SHARED / "record.jsonl").read_text().splitlines()]


def cluster() -> dict[str, Any]:
    """Returns the cluster; fails unless all servers are members of the same one."""
    names = {node(name).check_output("cat /var/lib/rancher/k3s/server/db/etcd/cluster") for name in SERVERS}
    assert len(names) == 1, f"there are {len(names)} clusters"
    found: dict[str, Any] = json.loads((SHARED / f"cluster-{names.pop()}.json").read_text())
    return found


def in_service() -> dict[str, tuple[str, bool]]:
    """Returns the release of each ready node, and whether it is schedulable."""
    found = {}
    for name, about in cluster()["nodes"].items():
        if time.time() - about["seen"] < 4:
            found[name] = (about["version"], not about["cordoned"])
    return found


def make_anew(name: str) -> None:
    """Resets a node as a reinstallation does; waits until the cluster reports it as lost."""
    node(name).check_output(
        "sh -c 'systemctl stop k3s k3s-agent; rm -rf /var/lib/rancher /etc/rancher /usr/local/bin/k3s"
        " /etc/systemd/system/k3s*.service; systemctl daemon-reload'"
    )
    time.sleep(5)


def test_a_first_server_that_was_made_anew_joins_the_others() -> None:
    make_anew("s1")
    succeeds("k3s.yml")
    assert cluster()["members"] == SERVERS
    last = [event for event in records() if event["node"] == "s1" and "begun" in event][-1]
    assert (last["init"], last["server"]) == ("", "https://10.203.92.12:6443")
    before = len(records())
    assert succeeds("k3s.yml").count("changed=0") == len(NODES)
    assert len(records()) == before


def test_servers_in_another_order_stay_one_cluster_and_are_not_restarted() -> None:
    before = len(records())
    succeeds("k3s.yml", groups={"k3s_server": ["s3", "s1", "s2"]})
    assert cluster()["members"] == SERVERS
    assert [event["node"] for event in records()[before:] if event["node"] in SERVERS] == []
    succeeds("k3s.yml")


def test_an_agent_that_was_made_anew_joins_again() -> None:
    make_anew("a1")
    succeeds("k3s.yml", "--limit", "a1")
    assert in_service()["a1"] == (OLD, True)


def test_a_machine_with_the_name_of_another_is_refused() -> None:
    node("a1").check_output("mv /etc/rancher/node/password /root/password")
    try:
        status, text = play("k3s.yml", "--limit", "a1")
    finally:
        node("a1").check_output("mv /root/password /etc/rancher/node/password")
    assert status != 0
    assert "a1 is not a member of the cluster, but a node a1 is ready there: another machine has that name" in text


def test_a_minor_version_may_not_be_skipped_and_nothing_is_drained() -> None:
    before = len(records())
    status, text = play("upgrade-k3s.yml", "-e", f"k3s_version={FAR}")
    assert status != 0
    assert f"s1 runs K3s {OLD}, which cannot be changed to {FAR}" in text
    assert len(records()) == before


def test_a_node_that_cannot_be_drained_ends_the_upgrade_and_serves_as_before() -> None:
    (SHARED / "stuck-s2").touch()
    try:
        status, text = play("upgrade-k3s.yml", "-e", f"k3s_version={NEW}")
    finally:
        (SHARED / "stuck-s2").unlink()
    assert status != 0
    assert f"s2 runs {OLD} and is back in service; later nodes were not started" in text
    assert "Cannot evict pod: it would violate its budget" in text
    assert in_service() == {"s1": (NEW, True), "s2": (OLD, True), "s3": (OLD, True), "a1": (OLD, True)}


def test_the_same_command_goes_on_and_drains_each_node_before_it_is_upgraded() -> None:
    before = len(records())
    succeeds("upgrade-k3s.yml", "-e", f"k3s_version={NEW}")
    assert in_service() == dict.fromkeys(NODES, (NEW, True))
    what = [
        (event["node"], next(key for key in ("drain", "begun", "ready", "uncordon") if key in event))
        for event in records()[before:]
    ]
    assert what == [(name, step) for name in ("s2", "s3", "a1") for step in ("drain", "begun", "ready", "uncordon")]
    assert node("s1").check_output("ls /var/lib/rancher/k3s-backup/snapshots"), "no snapshot before the upgrade"


@pytest.fixture(scope="module")
def saved() -> str:
    """Backs up the cluster; returns its secret at that time."""
    node("s1").check_output("k3s etcd-snapshot save")
    succeeds("backup.yml", "-e", f"k3s_version={NEW}", "--limit", "s1")
    # Started manually only: a run by the timer during a test would lock the repository.
    node("s1").check_output("systemctl stop ictx-backup.timer")
    node("s1").check_output("systemctl start ictx-backup")
    return (STATE / "secrets/k3s_token").read_text().strip()


def test_a_snapshot_that_is_not_there_is_named_and_nothing_is_stopped(saved: str) -> None:
    before = len(records())
    status, text = play("restore-k3s.yml", "-e", f"k3s_version={NEW}", "-e", "restore_file=nothing")
    assert status != 0
    assert "s1 has no snapshot nothing in /var/lib/rancher/k3s-backup/snapshots; nothing was stopped" in text
    assert len(records()) == before


def test_a_cluster_comes_back_from_the_backup_with_the_secret_that_opens_it(saved: str) -> None:
    node("s1").check_output(f"{PODS} cordon a1")
    node("s1").check_output("rm -rf /var/lib/rancher/k3s-backup")
    (STATE / "secrets/k3s_token").write_text("lost\n")
    succeeds("restore-k3s.yml", "-e", f"k3s_version={NEW}", "-e", "restore_snapshot=latest")
    assert (STATE / "secrets/k3s_token").read_text().strip() == saved
    found = cluster()
    assert found["members"] == SERVERS
    assert not found["nodes"]["a1"]["cordoned"], "a change after the snapshot survived the restore"
    for name in SERVERS:
        assert node(name).check_output("ls /var/lib/rancher/k3s/server").count("db.before-") == 1
    succeeds("k3s.yml", "-e", f"k3s_version={NEW}")
    time.sleep(5)
    assert in_service() == dict.fromkeys(NODES, (NEW, True))


def test_certificates_are_rotated_node_by_node_and_the_kubeconfig_follows() -> None:
    def serials() -> list[str]:
        return [node(name).check_output("sh -c 'cat /var/lib/rancher/k3s/*/tls/serial'") for name in NODES]

    before, kubeconfig, events = serials(), (STATE / "kubeconfig").read_text(), len(records())
    succeeds("rotate-k3s-certificates.yml", "-e", f"k3s_version={NEW}")
    assert [one for one, other in zip(before, serials(), strict=True) if one == other] == []
    assert (STATE / "kubeconfig").read_text() != kubeconfig
    order = [event["node"] for event in records()[events:]]
    assert order == [name for name in NODES for _ in ("begun", "ready")]


def test_a_node_is_added_and_removed() -> None:
    more = {"k3s_agent": ["a1", "spare"]}
    succeeds("k3s.yml", "-e", f"k3s_version={NEW}", "--limit", "spare", groups=more)
    assert in_service()["spare"] == (NEW, True)
    status, text = play("remove-k3s-node.yml", "-e", "nodes=a1")
    assert status != 0
    assert "nodes is a1, but the nodes of Kubernetes that are not in the inventory are: spare" in text
    succeeds("remove-k3s-node.yml", "-e", "nodes=spare")
    assert sorted(cluster()["nodes"]) == ["a1", *SERVERS]
    assert not node("spare").service("k3s-agent").is_running
    assert not node("spare").file("/etc/rancher/node").exists


@pytest.mark.parametrize(
    ("changes", "words", "refusal"),
    [
        ({"token": "wrong"}, "server", "token is not valid: https://10.203.92.11:6443/cacerts: 401 Unauthorized"),
        ({"server": "https://10.203.92.99:6443"}, "server", "failed to get CA certs"),
        ({"disable": ["traefik"]}, "server", "critical configuration value mismatch between servers"),
        ({"node-name": "s2"}, "server", "duplicate node name found"),
        (
            {},
            "server --cluster-reset --cluster-reset-restore-path=/nothing",
            "cannot perform cluster-reset while server URL",
        ),
        (
            {"server": None},
            "server --cluster-reset --cluster-reset-restore-path=/nothing",
            "snapshot path does not exist",
        ),
    ],
)
def test_the_stand_in_refuses_what_k3s_refuses(changes: dict[str, Any], words: str, refusal: str) -> None:
    config = yaml.safe_load(node("s2").check_output("cat /etc/rancher/k3s/config.yaml"))
    config |= {"node-name": "spare", "server": "https://10.203.92.11:6443", **changes}
    text = yaml.safe_dump({key: value for key, value in config.items() if value is not None})
    spare = node("spare")
    spare.check_output("mkdir -p /etc/rancher/k3s")
    spare.check_output(f"printf %s {shlex.quote(text)} >/etc/rancher/k3s/config.yaml")
    done = spare.run(f"timeout 20 /usr/local/bin/k3s {words}")
    assert done.rc != 0
    assert refusal in done.stdout + done.stderr
