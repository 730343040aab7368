# ruff: noqa: E501 (each problem is one line, as users see it)
"""Invalid hosts, networks, and values that YAML parses as another type are rejected in one line with the remedy."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from altered_lab import found
from cluster import ROOT
from test_check_inventory import problems

LONG = "x" * 70


def test_hosts_resources_and_networks(tmp_path: Path) -> None:
    def hosts(groups: Any) -> None:
        groups["slurm_compute"]["hosts"] |= {
            "1001": {"ansible_host": "192.0.2.1"},
            LONG: {"ansible_host": "192.0.2.2"},
            "n5": {"ansible_host": "10.203.77.22"},
            "n6": {"ansible_host": "0.0.0.0"},
            "n7": {"ansible_host": "10.42.3.7"},
            "n8": {"ansible_host": "192.0.2.8", "slurm_gres": [{"name": "gpu", "type": "a", "count": 2}] * 2},
            "n9": {"ansible_host": "192.0.2.9", "slurm_real_memory_mb": 1000, "slurm_reserved_memory_mb": 1000},
            "n10": {
                "ansible_host": "192.0.2.10",
                "slurm_gres": [{"name": "gpu", "type": "a100", "count": 8, "file": "/dev/nvidia[0-3]"}],
            },
            "n11": {"ansible_host": "192.0.2.11", "slurm_pam_adopt": True},
        }
        groups["k3s_server"]["hosts"] |= {"Kube_2": {"ansible_host": "192.0.2.41"}}
        groups["k3s_agent"] = {"hosts": {"n10": None}}
        groups["slurm_controller"]["hosts"] |= {"ctl2": {"ansible_host": "192.0.2.12"}}

    config = {"k3s_config": {"service-cidr": "10.42.128.0/17"}, "slurm_state_dir": "/var/lib/slurm/state"}
    assert found(tmp_path, config, hosts) == {
        "host 1001: is a number, which programs parse as an address: rename it",
        f"host {LONG}: has a name of more than 64 characters (63 a label), which no certificate can have",
        "ansible_host: n2 and n5 have the same address, 10.203.77.22",
        "ansible_host (n6): 0.0.0.0 is not the address of a host",
        "k3s_config.cluster-cidr: 10.42.0.0/16 has the address of n7 (10.42.3.7): use another network",
        "k3s_config.cluster-cidr: 10.42.0.0/16 overlaps k3s_config.service-cidr (10.42.128.0/17)",
        "slurm_gres (n8): 2 items are gpu:a: merge them and add their counts",
        "slurm_reserved_memory_mb (n9): 1000 leaves no memory of slurm_real_memory_mb (1000)",
        "slurm_gres (n10): gpu:a100 has the count 8, but /dev/nvidia[0-3] is 4 devices",
        "host n10: has GPUs for jobs (slurm_gres) and is a node of Kubernetes: two schedulers would allocate the same",
        "slurm_pam_adopt (n11): needs cgroups: set slurm_process_tracking: cgroup",
        "host Kube_2: is a node of Kubernetes, whose name must have neither capitals nor '_': rename it kube-2",
        "group k3s_server: has 2 hosts: etcd tolerates the loss of fewer than half, so use 1 or 3",
        "slurm_state_dir: /var/lib/slurm/state is not shared, but there are 2 controllers: move it below /shared, or the "
        "backup starts without jobs",
    }


@pytest.mark.parametrize(
    "address", ["{}", '{ansible_host: "fd00:10::N"}', "{ansible_host: 198.51.100.N, ictx_address: 192.0.2.N}"]
)
def test_hosts_may_have_names_alone_ipv6_or_two_addresses(tmp_path: Path, address: str) -> None:
    copy = shutil.copytree(ROOT / "inventories/example", tmp_path / "inventory")
    text = re.sub(
        r"\{ansible_host: 192\.0\.2\.(\d+)\}",
        lambda found: address.replace("N", found[1]),
        (copy / "hosts.yml").read_text(),
    )
    (copy / "hosts.yml").write_text(text)
    assert [problem for problem in problems(copy) if "CHANGE-ME" not in problem] == []


def test_values_that_yaml_reads_as_others_and_names_that_programs_change(tmp_path: Path) -> None:
    copy = shutil.copytree(ROOT / "inventories/lab", tmp_path / "inventory")
    (copy / "group_vars/all/zz_test.yml").write_text("""
slurm_jobs_time: 24:00:00
slurm_partitions: [{name: batch, nodes: ALL, max_time: 12:00:00}]
image_bake_python: 3.10
nvidia_driver_version: 580.95
ictx_cluster_name: Alpha
ictx_registry: fd00:10::15:5000
ictx_users: [{name: Dora, uid: 2001}, {name: root, uid: 2002}, {name: eve, uid: 2003}, {name: eva, uid: 2003}]
ictx_promoters: [eve]
slurm_qos: [{name: normal}]
storage_nfs_clients: 10.0.0.0/8
""")
    quotes = "must be text: put it in quotes"
    system = (
        "must be a login name of lowercase letters, digits, '_' or '-' that is not an account or group of the system"
    )
    assert set(problems(copy)) == {
        f"slurm_jobs_time (all hosts): {quotes}",
        f"slurm_partitions (all hosts): each item max_time {quotes}",
        f"image_bake_python (all hosts): {quotes}",
        f"nvidia_driver_version (all hosts): {quotes}",
        "ictx_cluster_name (all hosts): must be 1 to 63 lowercase letters, digits or '-', starting and ending with a letter or digit, got 'Alpha'",
        "ictx_registry (all hosts): must be HOST or HOST:PORT, got 'fd00:10::15:5000'",
        f"ictx_users (all hosts): each item name {system}, got 'Dora'",
        f"ictx_users (all hosts): each item name {system}, got 'root'",
        "storage_nfs_clients (all hosts): must be a list, got '10.0.0.0/8'",
    }


def test_proxies_and_versions_of_packages(tmp_path: Path) -> None:
    variables = {
        "ictx_proxy": {"http": "http://proxy.example.org", "no_proxy": [".example.org"]},
        "common_apt_pins": [
            {"packages": ["slurmctld", "slurmd"], "version": "22.05.8*"},
            {"packages": ["slurmd", "grafana"], "version": "11*"},
        ],
        "prometheus_source": "upstream",
        "prometheus_version": "3.99.0",
    }
    assert found(tmp_path, variables) == {
        "ictx_proxy: http: http://proxy.example.org has no port, and programs' defaults differ: add it, such as :3128",
        "common_apt_pins (all hosts): slurmd has 2 pins, of which apt uses the first: keep one",
        "common_apt_pins (all hosts): grafana is pinned by grafana_version: set that instead",
        "prometheus_version: 3.99.0 is not one of prometheus_checksums (3.13.2): add the SHA-256 of its archive",
    }
    assert found(tmp_path / "known", {"prometheus_source": "upstream"}) == set()


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("http://proxy:3128", "must be a dictionary, got 'http://proxy:3128'"),
        ({"http": "proxy:3128"}, "http must be http(s)://HOST[:PORT][/PATH] without a user or password, got 'proxy:3128'"),
        ({"http": "http://a:b@proxy:1"}, "http must be http(s)://HOST[:PORT][/PATH] without a user or password, got 'http://a:b@proxy:1'"),
        ({"http": "http://proxy:1", "no_proxy": "a,b"}, "no_proxy must be a list, got 'a,b'"),
        (
            {"http": "http://proxy:1", "no_proxy": ["https://x.example.org/"]},
            "no_proxy each item must be a host, address, domain (.example.org) or network (192.0.2.0/24), got 'https://x.example.org/'",
        ),
        ({"no_proxy": ["x"]}, "has neither http nor https: set one, such as {http: http://proxy.example.org:3128}"),
    ],
)  # fmt: skip
def test_proxies_of_another_form(tmp_path: Path, value: Any, problem: str) -> None:
    assert {text.replace(" (all hosts)", "") for text in found(tmp_path, {"ictx_proxy": value})} == {
        f"ictx_proxy: {problem}"
    }
