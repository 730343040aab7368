"""The control host takes only the certificates from a node's kubeconfig."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from cluster import ROOT, trusted
from programs import loaded

FILTER = loaded(ROOT / "playbooks/plugins/filter/kubeconfig.py").plain_kubeconfig
SERVER = "https://192.0.2.31:6443"
CLUSTER = {"server": "https://127.0.0.1:6443", "certificate-authority-data": "Y2E="}
USER = {"client-certificate-data": "Y2VydA==", "client-key-data": "a2V5"}


def config(cluster: Any, user: Any) -> str:
    """Returns a kubeconfig in K3s' format."""
    named = {"clusters": [{"name": "default", "cluster": cluster}], "users": [{"name": "default", "user": user}]}
    return yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **named, "current-context": "default"})


@pytest.mark.attack(
    "M1",
    "root of a Kubernetes node puts `exec`, files or another server into the kubeconfig that the control host fetches",
    before="the control host's Kubernetes client ran the program",
    now="only certificates are used from it; the server's address comes from the inventory",
)
def test_a_node_names_no_program_file_or_server_in_the_control_hosts_kubeconfig() -> None:
    more = {"proxy-url": "http://192.0.2.66", "insecure-skip-tls-verify": True, "certificate-authority": "/etc/passwd"}
    program = {"exec": {"command": "sh", "apiVersion": "client.authentication.k8s.io/v1"}, "tokenFile": "/etc/shadow"}
    made = yaml.safe_load(FILTER(config({**CLUSTER, **more}, {**USER, **program}), SERVER))
    assert made["clusters"] == [{"name": "ictx", "cluster": {**CLUSTER, "server": SERVER}}]
    assert made["users"] == [{"name": "admin", "user": USER}]
    assert made["contexts"] == [{"name": made["current-context"], "context": {"cluster": "ictx", "user": "admin"}}]
    assert set(made) == {"apiVersion", "kind", "clusters", "users", "contexts", "current-context"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: [",
        "[]",
        config(CLUSTER, {}),
        config({**CLUSTER, "certificate-authority-data": "no base64!"}, USER),
        config(CLUSTER, {**USER, "client-key-data": 5}),
        "!!python/object/apply:os.system [id]",
    ],
)
def test_one_without_certificates_is_refused(text: str) -> None:
    with pytest.raises(AnsibleFilterError, match="certificates are missing or cannot be read"):
        FILTER(text, SERVER)


def test_an_address_that_ansible_has_tagged_is_written_as_text() -> None:
    made = yaml.safe_load(FILTER(config(CLUSTER, USER), trusted(SERVER)))
    assert made["clusters"][0]["cluster"]["server"] == SERVER


def test_both_distributions_keep_it_so() -> None:
    for tasks in ("k3s/tasks/kubeconfig.yml", "kube_lab/tasks/service.yml"):
        assert "| plain_kubeconfig(" in (ROOT / "roles" / tasks).read_text()
