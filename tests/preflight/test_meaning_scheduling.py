# ruff: noqa: E501 (each problem is one line, as users see it)
"""Inconsistent partitions, accounts, topology and nodes of SLURM are rejected, each in one line with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from altered_lab import found
from cluster import ROOT
from programs import loaded

jobs = loaded(ROOT / "playbooks/plugins/filter/meaning_jobs.py")
meaning = loaded(ROOT / "playbooks/plugins/filter/meaning.py")


def test_partitions_and_the_jobs_that_go_there(tmp_path: Path) -> None:
    variables = {
        "slurm_partitions": [
            {"name": "batch", "nodes": ["n1", "n9"], "default": True, "max_time": "1:00:00"},
            {"name": "urgent", "nodes": "n[1-3],n2", "default": True, "allow_qos": ["urgnt"]},
            {"name": "none", "nodes": []},
            {"name": "odd", "nodes": "n[3-1]"},
            {"name": "open", "nodes": "n[1"},
        ],
        "slurm_qos": [{"name": "normal"}, {"name": "urgent", "users": ["researchr"]}, {"name": "urgent"}],
        "slurm_jobs_partition": "batch",
        "slurm_jobs_time": "2:00:00",
        "slurm_jobs_grace_seconds": 7200,
        "slurm_jobs_nodes": 2,
        "slurm_jobs_stages": {
            "extend": {"config": "extend/tiny.yaml", "after": "pretrain", "partition": "btch"},
            "sft": {"config": "sft/tiny.yaml", "after": "extend", "gpus_per_node": 4, "nodes": 1},
        },
    }
    stages = "slurm_jobs_stages: "
    assert found(tmp_path, variables) == {
        "slurm_partitions: batch has the node n9, which is not in slurm_compute",
        "slurm_partitions: urgent has the node n3, which is not in slurm_compute",
        "slurm_partitions: urgent has the node n2 2 times",
        "slurm_partitions: urgent allows the QOS urgnt, which is not in slurm_qos; did you mean urgent?",
        "slurm_partitions: batch and urgent are both the default: keep one",
        "slurm_partitions: none has no nodes: list some, or set nodes: ALL",
        "slurm_partitions: odd: [3-1] is not a range of numbers",
        "slurm_partitions: open: n[1 is not a list of nodes",
        "slurm_qos: urgent has the user researchr, who is not one of ictx_users; did you mean researcher?",
        "slurm_qos: 2 items have the name urgent",
        "slurm_jobs_time: 2:00:00 exceeds the limit of the partition batch (1:00:00): jobs would never start",
        "slurm_jobs_grace_seconds: 7200 is not less than slurm_jobs_time (2:00:00)",
        "slurm_jobs_nodes: 2 nodes, but the partition batch has 1: jobs would never start",
        f"{stages}extend: partition: partition btch is not in slurm_partitions, which has batch, urgent, none, odd, open",
        f"{stages}sft: gpus_per_node: 4 GPUs on each of 1 nodes, but slurm_gres of the partition batch has at most 0 a node",
        f"{stages}sft: time: 2:00:00 exceeds the limit of the partition batch (1:00:00): jobs would never start",
        f"{stages}sft: grace_seconds: 7200 is not less than slurm_jobs_time (2:00:00)",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [("90", 90), ("1:30", 1.5), ("1:00:00", 60), ("1-12", 2160), ("7-00:00:00", 10080), ("UNLIMITED", float("inf"))],
)
def test_time_limits(text: str, value: float) -> None:
    assert jobs.minutes(text) == value


def test_accounts_name_what_exists(tmp_path: Path) -> None:
    variables = {
        "slurm_qos": [
            {"name": "normal"},
            {"name": "High", "preempt": ["Normal", "nrmal"]},
            {"name": "high"},
            {"name": "old", "state": "absent"},
        ],
        "slurm_accounts": [
            {"name": "Physics", "parent": "Optics", "qos": ["HIGH", "old"]},
            {"name": "optics", "parent": "physics"},
            {"name": "chemistry", "parent": "science"},
            {"name": "science", "state": "absent"},
        ],
        "slurm_associations": [
            {"user": "researcher", "account": "PHYSICS", "default": True, "default_qos": "lw"},
            {"user": "researcher", "account": "optics", "default": True},
            {"user": "researchr", "account": "ictx"},
            {"user": "researcher", "account": "science"},
        ],
        "slurm_partitions": [
            {"name": "batch", "default": True, "allow_qos": ["HIGH"], "allow_accounts": ["Optics", "art"]},
        ],
    }
    accounts, associations = "slurm_accounts: ", "slurm_associations: "
    assert found(tmp_path, variables) == {
        "slurm_qos: High preempts nrmal, which is not in slurm_qos; did you mean normal?",
        "slurm_qos: High has preempt, which needs slurm_preempt_type: qos",
        "slurm_qos: 2 items have the name high",
        f"{accounts}Physics has the QOS old, which is not in slurm_qos",
        f"{accounts}chemistry has the parent science, which is not in slurm_accounts",
        f"{accounts}physics is its own ancestor: correct its parent",
        f"{accounts}optics is its own ancestor: correct its parent",
        f"{associations}researcher PHYSICS has the QOS lw, which is not in slurm_qos",
        f"{associations}an item has the user researchr, who is not one of ictx_users; did you mean researcher?",
        f"{associations}researcher has the account science, which is not in slurm_accounts",
        f"{associations}researcher has 2 default accounts: keep one",
        "slurm_partitions: batch allows the account art, which is not in slurm_accounts",
    }


def test_a_topology_has_each_node_once(tmp_path: Path) -> None:
    variables = {
        "slurm_topology": [
            {"name": "spine", "switches": ["leaf1", "leaf3"]},
            {"name": "leaf1", "nodes": "n[1,9]"},
            {"name": "leaf2", "nodes": ["n1"], "switches": ["leaf1"]},
            {"name": "leaf4"},
        ],
    }
    assert found(tmp_path, variables) == {
        "slurm_topology: spine is above leaf1, which must be listed before it",
        "slurm_topology: leaf1 is below spine and below leaf2: a tree has one parent, remove it from one",
        "slurm_topology: spine is above leaf3, which must be listed before it",
        "slurm_topology: leaf1 has the node n9, which is not in slurm_compute",
        "slurm_topology: leaf2 needs either nodes or switches",
        "slurm_topology: n1 is at leaf1 and at leaf2: remove it from one",
        "slurm_topology: leaf4 needs either nodes or switches",
        "slurm_topology: n2 is at no switch: jobs could not use it with another node; add it to one",
    }


def test_groups_of_nodes(tmp_path: Path) -> None:
    a100 = {"name": "gpu", "type": "a100", "count": 4, "file": "/dev/nvidia[0-3]"}
    variables = {
        "slurm_node_groups": [
            {"name": "big", "nodes": "n[1-3]", "cpus": 24, "gres": [a100]},
            {"name": "small", "nodes": ["n2"], "sockets": 2, "gres": [{**a100, "count": 8}]},
            {"name": "open", "nodes": "n[1"},
        ],
        "slurm_jobs_gpus_per_node": 4,
        "slurm_config": {"NodeName": "n3", "SchedulerParameters": "bf_continue,bf_window=2880", "MailProg": None},
    }
    assert found(tmp_path, variables) == {
        "slurm_config: NodeName must be set by slurm_node_groups",
        "slurm_node_groups: big has the node n3, which is not in slurm_compute",
        "slurm_node_groups: n2 is in big and in small: remove it from one",
        "slurm_node_groups: small needs sockets, cores_per_socket and threads_per_core, or cpus alone",
        "slurm_node_groups: small: gpu:a100 has the count 8, but /dev/nvidia[0-3] is 4 devices",
        "slurm_node_groups: open: n[1 is not a list of nodes",
    }


def test_devices_of_mig_are_those_that_the_driver_makes(tmp_path: Path) -> None:
    caps = "/dev/nvidia-caps/nvidia-cap"
    two = [f"/dev/nvidia3,{caps}{number},{caps}{number + 1}" for number in (408, 417)]
    right = {"name": "gpu", "type": "a100_3g.20gb", "count": 2, "devices": two}
    whole = {"name": "gpu", "type": "a100", "count": 3, "file": "/dev/nvidia[0-2]"}

    def hosts(*gres: Any, profiles: Any = ("3g.20gb", "3g.20gb"), gpus: Any = (3,)) -> Callable[[Any], None]:
        driver = [{"gpus": list(gpus), "profiles": list(profiles)}]
        host = {"ansible_host": "192.0.2.8", "slurm_gres": list(gres), "nvidia_driver_mig": driver}

        def add(groups: Any) -> None:
            for name in ("slurm_compute", "gpu"):
                groups.setdefault(name, {}).setdefault("hosts", {})
                groups[name]["hosts"] = {**(groups[name]["hosts"] or {}), "n8": host if name == "gpu" else None}

        return add

    assert found(tmp_path / "a", {}, hosts(right, whole)) == set()
    assert found(tmp_path / "b", {}, hosts({**whole, "count": 4, "file": "/dev/nvidia[0-3]"})) == {
        "slurm_gres (n8): gpu:a100 has /dev/nvidia3, which nvidia_driver_mig divides: list its MIG devices in devices"
    }
    assert found(tmp_path / "c", {}, hosts(right, profiles=["1g.5gb"])) == {
        "slurm_gres (n8): gpu:a100_3g.20gb has devices, but nvidia_driver_mig creates 1g.5gb: set one as type"
    }
    assert found(tmp_path / "d", {}, hosts(right, profiles=["3g.20gb"])) == {
        "slurm_gres (n8): gpu:a100_3g.20gb has the count 2, but nvidia_driver_mig creates 1"
    }
    assert found(tmp_path / "e", {}, hosts({**right, "count": 3}, gpus=[])) == {
        "slurm_gres (n8): gpu:a100_3g.20gb has the count 3, but 2 devices"
    }


def test_gpus_of_groups_and_of_measured_nodes_count_for_jobs(tmp_path: Path) -> None:
    a100 = {"name": "gpu", "type": "a100", "count": 4}
    variables = {
        "slurm_measured_nodes": [{"nodes": "n[1-2]", "gres": [{**a100, "count": 2}]}],
        "slurm_node_groups": [{"name": "big", "nodes": "n1", "gres": [a100]}],
        "slurm_jobs_gpus_per_node": 4,
    }
    assert found(tmp_path, variables) == {
        "slurm_jobs_gpus_per_node: 4 GPUs on each of 2 nodes, but slurm_gres of the partition batch has at most 4 a node"
    }


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu1", ["gpu1"]),
        ("gpu[1-3,7],cpu1", ["gpu1", "gpu2", "gpu3", "gpu7", "cpu1"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_lists_of_nodes(text: str, names: list[str]) -> None:
    assert meaning.Inventory.nodes(text) == names
