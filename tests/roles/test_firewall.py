"""The firewall allows the ports of playbooks/vars/ports.yml and no others; nft validates the rules."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT, Cluster
from programs import libraries, loaded, program

FILTERS = loaded(ROOT / "playbooks/plugins/filter/firewall.py")
PORTS = yaml.safe_load((ROOT / "playbooks/vars/ports.yml").read_text())["open_ports"]


@cache
def example() -> tuple[Cluster, Any, Any]:
    """Returns the example inventory, and the role with its play."""
    cluster = Cluster(ROOT / "inventories/example", {"ictx_state_dir": "/nonexistent"})
    role, play, _ = next(cluster.uses("playbooks/firewall.yml"))
    return cluster, role, play


def rules(host: str, **variables: Any) -> str:
    """Returns the rules of a host of the example inventory with the firewall enabled."""
    cluster, role, play = example()
    known = {**cluster.variables(host, play, role), "firewall_enabled": True, **variables}
    return cluster.render(ROOT / "roles/firewall/templates/ictx.nft.j2", known)


def test_a_compute_node_is_open_to_its_cluster_and_to_prometheus() -> None:
    text = rules("gpu1")
    assert re.search(
        r"ip saddr \{ [^}]*192\.0\.2\.11[^}]* \} meta l4proto tcp accept comment \"slurmd and jobs\"", text
    )
    (metrics,) = re.findall(r"ip saddr \{ (.*?) \} tcp dport \{ 9400 \}", text)
    assert metrics == "192.0.2.15"
    assert "6817" not in text
    assert "policy drop" in text


def test_ssh_is_let_in_before_anything_else_and_on_its_own_port() -> None:
    lines = [line.strip() for line in rules("gpu1", ansible_port=2222).splitlines()]
    assert lines[lines.index("type filter hook input priority filter; policy drop;") + 1].startswith(
        "tcp dport 2222 accept"
    )


def test_a_port_that_a_variable_moves_is_open_where_it_is() -> None:
    assert "tcp dport { 5443 } accept" in rules("infra1", grafana_listen="[::1]:5443")


def test_addresses_of_both_families_and_overlapping_networks_are_sets() -> None:
    sources = ["192.0.2.1", "192.0.2.0/24", "fd00:10::15", "192.0.2.7"]
    opening = {"what": "x", "protocol": "udp", "ports": ["1-5", 7], "from": sources}
    assert FILTERS.firewall_rules([opening]) == [
        'ip saddr { 192.0.2.0/24 } udp dport { 1-5, 7 } accept comment "x"',
        'ip6 saddr { fd00:10::15 } udp dport { 1-5, 7 } accept comment "x"',
    ]
    assert FILTERS.firewall_rules([{"what": "y", "ports": [80]}]) == ['tcp dport { 80 } accept comment "y"']


def test_only_tables_of_its_own_are_touched() -> None:
    text = rules("gpu1") + (ROOT / "roles/firewall/templates/ictx-firewall.service.j2").read_text()
    assert "flush ruleset" not in text
    assert set(re.findall(r"(?m)^(?:delete )?table (\w+ \w+)", text)) == {"inet ictx"}
    assert re.findall(r"hook (\w+)", text) == ["input"], "forwarded traffic of pods is not filtered"


@pytest.mark.parametrize("host", ["gpu1", "ctl1", "nas1", "infra1", "db1"])
def test_nft_takes_the_rules(tmp_path: Path, host: str) -> None:
    (tmp_path / "rules").write_text(rules(host))
    nft = program("nft")
    command = [nft, "--check", "--file", tmp_path / "rules"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=libraries(nft))
    if "Operation not permitted" in done.stderr:
        pytest.skip("no rules can be checked here")
    assert done.returncode == 0, done.stderr


def test_every_group_is_one_of_the_inventory_s() -> None:
    known = yaml.safe_load((ROOT / "playbooks/plugins/inventory_schema.yml").read_text())["groups"].keys() | {"all"}
    assert {group for entry in PORTS for group in [*entry["hosts"], *entry.get("from", [])]} <= known


def test_defaults_are_those_of_the_roles() -> None:
    for variable, port in re.findall(r"\{\{ (\w+) \| default\('?:?(\d+)'?\)", str(PORTS).replace('"', "'")):
        role = next(path for path in (ROOT / "roles").iterdir() if variable.startswith(f"{path.name}_"))
        default = yaml.safe_load((role / "defaults/main.yml").read_text())[variable]
        assert str(default).rpartition(":")[2] == port, variable


def test_the_page_of_ports_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/ports", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
