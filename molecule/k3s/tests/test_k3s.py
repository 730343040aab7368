"""The role k3s: what it does on the nodes, in which order, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import testinfra
import yaml
from testinfra.host import Host

STATE = Path(os.environ["ICTX_LAB_STATE"])
RECORD = STATE / "shared" / "record.jsonl"
SERVERS = ["s1", "s2", "s3"]
NODES = [*SERVERS, "a1"]
OLD, NEW, TAMPERED, FAR = "v1.34.1+k3s1", "v1.34.2+k3s1", "v1.35.0+k3s1", "v1.36.0+k3s1"


def node(name: str) -> Host:
    """Returns testinfra's host of a node."""
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(STATE / "ssh/config"))


def config(name: str) -> dict[str, Any]:
    """Returns a node's config.yaml."""
    content: dict[str, Any] = yaml.safe_load(node(name).file("/etc/rancher/k3s/config.yaml").content_string)
    return content


def provision(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs playbooks/k3s.yml."""
    command = ["ansible-playbook", "-i", os.environ["MOLECULE_INVENTORY"], os.environ["MOLECULE_PLAYBOOK"], *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def records() -> list[dict[str, Any]]:
    """Returns the events of the nodes, in order."""
    return [json.loads(line) for line in RECORD.read_text().splitlines()]


def secrets() -> list[str]:
    """Returns the secrets that must not be displayed."""
    return [
        (STATE / "secrets" / name).read_text().strip() for name in ("k3s_token", "k3s_agent_token", "registry_password")
    ]


def one_after_the_other(events: list[dict[str, Any]]) -> list[str]:
    """Returns the nodes in the order of their starts; fails unless each started after the previous one was ready."""
    order = []
    for begun, ready in zip(events[::2], events[1::2], strict=True):
        assert "begun" in begun
        assert "ready" in ready
        assert begun["node"] == ready["node"], events
        order.append(begun["node"])
    return order


def test_the_first_server_starts_the_cluster_and_the_others_join_it() -> None:
    events = records()
    assert one_after_the_other(events) == NODES
    begun = {event["node"]: event for event in events if "begun" in event}
    first = "https://10.203.86.11:6443"
    assert {name: (event["init"], event["server"]) for name, event in begun.items()} == {
        "s1": ("true", ""),
        "s2": ("", first),
        "s3": ("", first),
        "a1": ("", first),
    }
    assert [begun[name]["role"] for name in NODES] == ["server", "server", "server", "agent"]


def test_a_server_encrypts_secrets_and_keeps_an_audit_log() -> None:
    server = config("s2")
    assert server["secrets-encryption"] is True
    assert "audit-policy-file=/etc/rancher/k3s/audit-policy.yaml" in server["kube-apiserver-arg"]
    policy = yaml.safe_load(node("s2").file("/etc/rancher/k3s/audit-policy.yaml").content_string)
    levels = {
        name: rule["level"]
        for rule in policy["rules"]
        for group in rule.get("resources", [])
        for name in group["resources"]
    }
    assert levels["secrets"] == "Metadata", "the log must not contain secrets"
    assert {"10.203.86.11", "10.203.86.12", "10.203.86.13", "s1"} <= set(server["tls-san"])


def test_an_agent_does_not_know_the_secret_of_servers() -> None:
    token, agent_token, _ = secrets()
    assert config("a1")["token"] == agent_token
    assert token not in node("a1").file("/etc/rancher/k3s/config.yaml").content_string
    assert not node("a1").file("/etc/rancher/k3s/audit-policy.yaml").exists


@pytest.mark.parametrize("name", NODES)
def test_files_with_secrets_are_private(name: str) -> None:
    for file in ("config.yaml", "registries.yaml"):
        assert node(name).file(f"/etc/rancher/k3s/{file}").mode == 0o600


def test_nodes_reach_the_registry_with_its_certificate_and_password() -> None:
    registries = yaml.safe_load(node("a1").file("/etc/rancher/k3s/registries.yaml").content_string)
    entry = registries["configs"]["192.0.2.15:5000"]
    assert entry["auth"] == {"username": "ictx", "password": secrets()[2]}
    ours = (STATE / "ca/ca.crt").read_text().strip()
    assert node("a1").file(entry["tls"]["ca_file"]).content_string.strip() == ours
    assert registries["mirrors"]["docker.io"]["endpoint"] == ["https://192.0.2.15:5000"]


def test_a_node_with_the_runtime_serves_gpus() -> None:
    assert config("a1")["node-label"] == ["nvidia.com/gpu.present=true"]
    assert config("s1")["node-label"] == []
    manifest = node("s1").file("/var/lib/rancher/k3s/server/manifests/nvidia-device-plugin.yaml")
    pod = yaml.safe_load(manifest.content_string)["spec"]["template"]["spec"]
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}


def test_the_kubeconfig_reaches_the_servers_from_elsewhere() -> None:
    kubeconfig = STATE / "kubeconfig"
    assert kubeconfig.stat().st_mode & 0o777 == 0o600
    (cluster,) = yaml.safe_load(kubeconfig.read_text())["clusters"]
    assert cluster["cluster"] == {"server": "https://10.203.86.11:6443", "certificate-authority-data": "Y2E="}


def test_no_secret_was_shown_when_it_was_written() -> None:
    log = Path(os.environ["MOLECULE_LOG"]).read_text()
    assert "TASK [k3s : Configure K3s]" in log
    assert [secret for secret in secrets() if secret in log] == []


def test_another_run_changes_nothing_and_shows_no_secret_however_verbose() -> None:
    before = records()
    done = provision("-vvv", "--diff", "--check", "--limit", "s1:a1")
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("changed=0") == 2
    assert [secret for secret in secrets() if secret in done.stdout + done.stderr] == []
    assert records() == before


def test_a_file_that_is_not_the_locks_is_refused_and_nothing_is_installed() -> None:
    before = records()
    done = provision("-e", f"k3s_version={TAMPERED}")
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert f"K3s {TAMPERED} could not be downloaded" in output
    assert "nothing was installed" in output
    assert "checksum" in output
    for name in NODES:
        assert f"k3s version {OLD} " in node(name).check_output("/usr/local/bin/k3s --version")
    assert records() == before
    assert not list((STATE / "cache/k3s" / TAMPERED).iterdir()) or not (STATE / "cache/k3s" / TAMPERED / "k3s").exists()


def test_a_tampered_folder_for_networks_without_a_mirror_is_refused_on_a_new_node(tmp_path: Path) -> None:
    for file in (STATE / "shared/mirror" / OLD).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "k3s-airgap-images-amd64.tar.zst").write_text("something else\n")
    done = provision("-e", f"k3s_airgap_dir={tmp_path}", *as_agent(tmp_path))
    assert done.returncode != 0
    assert "k3s-airgap-images-amd64.tar.zst differs from the lock" in done.stdout + done.stderr
    for path in ("/usr/local/bin/k3s", "/etc/rancher", "/var/lib/rancher", "/etc/systemd/system/k3s-agent.service"):
        assert not node("spare").file(path).exists, path


def as_agent(folder: Path) -> list[str]:
    """Returns the options that make the spare node an agent and leave the others alone."""
    inventory = folder / "more.yml"
    inventory.write_text("k3s_agent: {hosts: {spare: }}\n")
    return ["-i", str(inventory), "--limit", "spare"]


def test_a_release_may_not_be_skipped() -> None:
    done = provision("-e", f"k3s_version={FAR}")
    assert done.returncode != 0
    assert f"s1 runs K3s {OLD}, which cannot be changed to {FAR}" in done.stdout + done.stderr


def test_an_upgrade_goes_through_the_servers_one_by_one_and_then_the_agents() -> None:
    before = len(records())
    done = provision("-e", f"k3s_version={NEW}")
    assert done.returncode == 0, done.stdout[-3000:]
    events = records()[before:]
    assert one_after_the_other(events) == NODES
    assert {event["version"] for event in events} == {NEW}


def test_there_is_no_way_back() -> None:
    done = provision("-e", f"k3s_version={OLD}")
    assert done.returncode != 0
    assert f"s1 runs K3s {NEW}, which cannot be changed to {OLD}" in done.stdout + done.stderr
