"""The filters of playbooks/monitoring.yml."""

from __future__ import annotations

import importlib.util

import bcrypt
import pytest
import yaml
from ansible.errors import AnsibleFilterError
from cluster import ROOT

SPEC = importlib.util.spec_from_file_location("monitoring_filters", ROOT / "playbooks/plugins/filter/monitoring.py")
FILTERS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(FILTERS)


def test_a_web_password_is_a_hash_of_the_password_and_always_the_same() -> None:
    made = FILTERS.web_password("secret", 21 * "a")
    assert made == FILTERS.web_password("secret", 21 * "a")
    assert bcrypt.checkpw(b"secret", made.encode())
    assert not bcrypt.checkpw(b"Secret", made.encode())
    assert made != FILTERS.web_password("secret", 21 * "b")


@pytest.mark.parametrize("salt", ["", "short", 20 * "a" + "-", 22 * "a"])
def test_a_salt_that_bcrypt_would_cut_or_refuse_is_named(salt: str) -> None:
    with pytest.raises(AnsibleFilterError, match="21 letters or digits"):
        FILTERS.web_password("secret", salt)


def test_no_two_hosts_or_users_have_the_same_hash_of_a_password() -> None:
    hosts = [FILTERS.web_users({"metrics": "secret", "admin": "secret"}, "salt", host) for host in ("n1", "n2")]
    hashes = [made for users in hosts for made in users.values()]
    assert len(set(hashes)) == 4
    assert all(bcrypt.checkpw(b"secret", made.encode()) for made in hashes)
    assert hosts[0] == FILTERS.web_users({"metrics": "secret", "admin": "secret"}, "salt", "n1"), "reproducible"


def test_targets_are_the_hosts_addresses_with_their_names() -> None:
    hostvars = {"b": {"ansible_host": "192.0.2.2"}, "a": {}}
    assert FILTERS.scrape_targets(["b", "a"], hostvars, 9100, "x") == [
        {"address": "a:9100", "labels": {"node": "a", "cluster": "x"}},
        {"address": "192.0.2.2:9100", "labels": {"node": "b", "cluster": "x"}},
    ]


def test_targets_have_the_port_on_which_the_host_listens() -> None:
    hostvars = {"a": {"node_exporter_listen": "192.0.2.1:9101"}, "b": {"node_exporter_listen": ":9102"}, "c": {}}
    found = FILTERS.scrape_targets(["a", "b", "c"], hostvars, 9100, "x")
    assert [target["address"] for target in found] == ["a:9101", "b:9102", "c:9100"]
    for port, name in FILTERS.LISTEN.items():
        defaults = yaml.safe_load((ROOT / f"roles/{name.removesuffix('_listen')}/defaults/main.yml").read_text())
        assert defaults[name] == f":{port}"


def test_gpus_of_a_host_that_was_not_looked_at_are_scraped_on() -> None:
    hostvars: dict[str, dict[str, bool]] = {
        "a": {"dcgm_exporter_present": True},
        "b": {"dcgm_exporter_present": False},
        "c": {},
        "d": {},
    }
    targets = "".join(f"- targets: ['192.0.2.1:9400']\n  labels: {{node: {name}}}\n" for name in "bc")
    assert FILTERS.hosts_with_gpus(["a", "b", "c", "d"], hostvars, targets) == ["a", "c"]
    assert FILTERS.hosts_with_gpus(["a", "b", "c", "d"], hostvars, "") == ["a"]
    assert FILTERS.hosts_with_gpus(["a"], {"a": {}}, "# managed\n[]\n") == []
