"""Configuration of K3s: how nodes join, whichever server is first in the inventory, and the interface of pods."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Any

import pytest
import yaml
from ansible.template import Templar
from cluster import ROOT, Cluster, trusted
from programs import loaded

SERVERS = ["k3s1", "k3s2", "k3s3"]


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a function: host, servers of the cluster, previous config.yaml → new config.yaml."""
    cluster = Cluster(ROOT / "inventories/example", {"ictx_state_dir": str(tmp_path_factory.mktemp("state"))})
    uses = {role.get_name(): (role, play) for role, play, _ in cluster.uses("site.yml")}

    def config(host: str, have: Sequence[str], before: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
        stats = [{"item": name, "stat": {"exists": name in have}} for name in SERVERS]
        slurped = (
            {"content": base64.b64encode(yaml.safe_dump(before).encode()).decode()} if before else {"failed": True}
        )
        registered = {"_k3s_runtime": {"stat": {"exists": False}}, "_k3s_clusters": {"results": stats}}
        variables = cluster.variables(host, uses["k3s"][1], uses["k3s"][0]) | registered | {"_k3s_before": slurped}
        templar = Templar(cluster.loader, variables=variables | others)
        found: dict[str, Any] = templar.template(trusted("{{ _k3s_config }}"))
        return found

    return config


def through(config: dict[str, Any]) -> tuple[bool, str]:
    """Returns whether a node starts a cluster, and the server through which it joins."""
    return config.get("cluster-init", False), config.get("server", "")


K3S = {name: f"https://192.0.2.{31 + number}:6443" for number, name in enumerate(SERVERS)}


@pytest.mark.parametrize(
    ("host", "have", "before", "wanted"),
    [
        ("k3s1", [], None, (True, "")),  # the first server
        ("k3s2", ["k3s1"], None, (False, "k3s1")),  # joins the first
        ("k3s1", ["k3s1", "k3s2", "k3s3"], {"cluster-init": True}, (True, "")),  # is unchanged
        ("k3s2", ["k3s1", "k3s2", "k3s3"], {"server": "k3s1"}, (False, "k3s1")),
        ("k3s1", ["k3s2", "k3s3"], {"cluster-init": True}, (False, "k3s2")),  # was rebuilt, or moved to the first place
        ("k3s1", ["k3s1", "k3s2", "k3s3"], {"server": "k3s2"}, (False, "k3s2")),  # the next run
        ("k3s2", ["k3s1", "k3s3"], {"server": "k3s3"}, (False, "k3s1")),
    ],
)
def test_a_server_joins_one_that_has_the_cluster(
    configured: Any, host: str, have: list[str], before: dict[str, Any] | None, wanted: tuple[bool, str]
) -> None:
    if before and "server" in before:
        before = {"server": K3S[before["server"]]}
    assert through(configured(host, have, before)) == (wanted[0], K3S.get(wanted[1], ""))


def test_a_balancer_is_what_nodes_join_through_once_there_is_a_cluster(configured: Any) -> None:
    assert through(configured("k3s1", [], k3s_api_address="api.example.org")) == (True, "")
    joined = through(configured("k3s2", ["k3s1"], k3s_api_address="api.example.org"))
    assert joined == (False, "https://api.example.org:6443")


def test_a_node_is_called_in_small_letters(configured: Any) -> None:
    assert configured("k3s1", [], inventory_hostname="K3S1", k3s_address="192.0.2.31")["node-name"] == "k3s1"


def test_ipv6_nodes_get_networks_of_ipv6_unless_the_inventory_has_others(configured: Any) -> None:
    assert "cluster-cidr" not in configured("k3s1", [])
    config = configured("k3s1", [], k3s_address="fd00:10::31")
    assert (config["node-ip"], config["cluster-cidr"]) == ("fd00:10::31", "fd42:42::/56")
    proxies = loaded(ROOT / "playbooks/plugins/filter/proxies.py")
    assert {name: config[name] for name in proxies.IPV6_NETWORKS} == proxies.IPV6_NETWORKS
    own = configured("k3s1", [], k3s_address="fd00:10::31", k3s_config={"cluster-cidr": "fd99::/56"})
    assert own["cluster-cidr"] == "fd99::/56"


FACTS = {
    "default_ipv4": {"interface": "eno1"},
    "default_ipv6": {"interface": "bond0.7"},  # from router advertisements
    "interfaces": ["lo", "eno1", "bond0.7"],
    "eno1": {"device": "eno1", "ipv4": {"address": "203.0.113.5"}, "ipv6": [{"address": "fd00:20::5"}]},
    "bond0_7": {
        "device": "bond0.7",
        "ipv4": {"address": "192.0.2.31"},
        "ipv4_secondaries": [{"address": "192.0.2.99"}],
        "ipv6": [{"address": "fd00:10::31"}],
    },
}


@pytest.mark.parametrize(
    ("address", "interface"),
    [
        ("192.0.2.31", "bond0.7"),
        ("192.0.2.99", "bond0.7"),
        ("fd00:10::31", None),
        ("203.0.113.5", None),
        ("fd00:20::5", "eno1"),
        ("k3s1", None),
    ],
)
def test_pods_use_the_interface_of_the_cluster_s_address(configured: Any, address: str, interface: str | None) -> None:
    assert configured("k3s1", [], k3s_address=address, ansible_facts=FACTS).get("flannel-iface") == interface


def test_every_cluster_keeps_snapshots_where_the_backup_takes_them(configured: Any) -> None:
    config = configured("k3s1", [], k3s_servers=["k3s1"])
    assert config["etcd-snapshot-dir"] == "/var/lib/rancher/k3s-backup/snapshots"


@pytest.mark.parametrize(("host", "deployed"), [("k3s1", True), ("k3s2", True), ("kgpu1", False)])
def test_every_server_has_the_device_plug_in(host: str, deployed: bool) -> None:
    """A server applies its own file when it starts, so the one that was first before must not keep an older one."""
    tasks = yaml.safe_load((ROOT / "roles/k3s/tasks/configure.yml").read_text())
    (when,) = (task["when"] for task in tasks if task["name"] == "Deploy NVIDIA's device plug-in")
    cluster = Cluster(ROOT / "inventories/example")
    role, play, _ = next(use for use in cluster.uses("site.yml") if use[0].get_name() == "k3s" and host in use[2])
    templar = Templar(cluster.loader, variables=cluster.variables(host, play, role))
    assert templar.template(trusted(f"{{{{ {when} }}}}")) == deployed


def test_a_start_that_waits_for_a_server_ends() -> None:
    """An agent retries forever, and its unit is of type notify: `systemctl start` would never return."""
    text = (ROOT / "roles/k3s/templates/k3s.service.j2").read_text()
    assert re.search(r"^TimeoutStartSec=[1-9]", text, re.MULTILINE)
