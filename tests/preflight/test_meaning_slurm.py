# ruff: noqa: E501 (each problem is one line, as users see it)
"""Preflight rejects settings that SLURM's programs would reject or never use, and accepts valid ones close to them."""

from __future__ import annotations

from typing import Any

import pytest
from cluster import ROOT
from programs import loaded

meaning = loaded(ROOT / "playbooks/plugins/filter/meaning.py")
HOSTS = {
    "slurm_controller": ["ctl1", "ctl2"],
    "slurm_database": ["db1"],
    "slurm_login": ["login1"],
    "slurm_compute": ["n1", "n2"],
}
GPU = {"name": "gpu", "type": "a100", "count": 4, "file": "/dev/nvidia[0-3]"}
BASE = {
    "ictx_shared_dir": "/shared",
    "slurm_account": "ictx",
    "slurm_gres": [GPU],
    "slurm_partitions": [{"name": "batch", "default": True}],
    "slurm_process_tracking": "cgroup",
    "slurm_slurmd_restart_seconds": 330,
    "slurm_slurmd_timeout": 300,
    "slurm_state_dir": "/shared/slurm",
}


def found(per_host: dict[str, dict[str, Any]] | None = None, **variables: Any) -> list[str]:
    """Returns the problems of a small cluster with these variables, as VARIABLE (HOST): TEXT."""
    slurm = sorted({host for hosts in HOSTS.values() for host in hosts})
    groups = {**HOSTS, "slurm": slurm, "all": slurm}
    values = {host: {**BASE, **variables, **(per_host or {}).get(host, {})} for host in slurm}
    problems = meaning.meaning_problems(values, groups)
    return [f"{name}{f' ({host})' if host else ''}: {text}" for name, text, host in problems]


def qos(**parts: Any) -> dict[str, Any]:
    return {"slurm_qos": [{"name": "normal"}, {"name": "high", **parts}]}


def account(**parts: Any) -> dict[str, Any]:
    return {"slurm_qos": [{"name": "normal"}, {"name": "high"}], "slurm_accounts": [{"name": "physics", **parts}]}


def mig(*entries: Any) -> dict[str, Any]:
    return {"slurm_gres": [], "nvidia_driver_mig": [{"gpus": gpus, "profiles": profiles} for gpus, profiles in entries]}


RIGHT = {
    "base": {},
    "limits": qos(grp_tres={"cpu": 64, "mem": "1T", "node": 2, "gres/gpu": 8, "license/matlab": 2}),
    "tracked by type": {**qos(grp_tres={"gres/gpu_a100": 8}), "slurm_config": {"AccountingStorageTRES": ["gres/gpu", "gres/gpu_a100"]}},
    "typed": {**qos(grp_tres={"gres/gpu:A100": 8, "gres/gpu": 16}), "slurm_config": {"AccountingStorageTRES": ["gres/gpu", "gres/gpu:a100"]}},
    "typed as text": {**account(grp_tres={"gres/gpu:a100": 8}), "slurm_config": {"accountingstoragetres": "gres/gpu, gres/gpu:a100"}},
    "operators": {"slurm_operators": ["alice", "ictx-metrics", "jobmon"], "ictx_users": [{"name": "alice", "uid": 2001}]},
    "topology": {"slurm_topology": [{"name": "l1", "nodes": "n1"}, {"name": "l2", "nodes": "n2"}, {"name": "s", "switches": ["l1", "l2"]}]},
    "flags": qos(flags=["denyonlimit", "OverPartQOS"]),
    "preempts": {**qos(preempt=["Normal"]), "slurm_preempt_type": "qos"},
    "default QOS": account(qos=["Normal", "HIGH"], default_qos="High"),
    "absent ones": {**account(state="absent"), "slurm_qos": [{"name": "normal"}, {"name": "old", "state": "absent"}]},
    "group": {"slurm_node_groups": [{"name": "a", "nodes": "n[1-2]", "cpus": 8, "memory_mb": 1000}], "slurm_real_memory_mb": 1000,
              "slurm_jobs_cpus_per_node": 8, "slurm_jobs_nodes": 2},
    "mig": mig(([0], ["3g.20gb", "3g.20gb", "1g.5gb"]), ([1], ["7g.40gb"])),
    "built on": {"slurm_config": {"SlurmUser": "slurm", "slurmctldport": 6817}},
    "config": {"slurm_config": {"MaxJobCount": 5, "schedulerparameters": "x", "FutureKeyOfSlurm": 1}, "slurm_cgroup_config": {"ConstrainCores": True}},
    "evaluation on one node": {
        "slurm_jobs_nodes": 2,
        "slurm_partitions": [{"name": "batch", "default": True}, {"name": "one", "nodes": "n1"}],
        "slurm_jobs_stages": {"eval": {"config": "eval/tiny.yaml", "after": "pretrain", "partition": "one"}},
    },
    "files": {"slurm_jobs_pretrain_config": "pretrain/ictx-1b.yaml", "slurm_jobs_sweep_config": "sweep/tiny.yaml"},
    "own image": {"slurm_jobs_image_dir": "/shared/images/mine", "slurm_jobs_pretrain_config": "mine.yaml"},
}  # fmt: skip
# Text of a problem, and the variables that cause it.
WRONG: dict[str, dict[str, Any]] = {
    "slurm_qos: high: grp_tres has gres/gpus, which neither a node nor SLURM has; did you mean gres/gpu?": qos(grp_tres={"gres/gpus": 8}),
    "slurm_qos: high: max_tres_per_user has cpus, which neither a node nor SLURM has; did you mean cpu?": qos(max_tres_per_user={"cpus": 8}),
    "slurm_qos: high: grp_tres has gres/gpu:a100, which is tracked by type only with slurm_config: {AccountingStorageTRES: [gres/gpu, gres/gpu:a100]}": qos(grp_tres={"gres/gpu:a100": 8}),
    "slurm_qos: high: grp_tres has gres/gpu, which neither a node nor SLURM has": {**qos(grp_tres={"gres/gpu": 8}), "slurm_config": {"AccountingStorageTRES": ["gres/gpu:a100"]}},
    "slurm_qos: high: grp_tres has gres/gpus:a100, which neither a node nor SLURM has": qos(grp_tres={"gres/gpus:a100": 8}),
    "slurm_operators: alise is not one of ictx_users; did you mean alice?": {"slurm_operators": ["alise", "ictx-metrics"], "ictx_users": [{"name": "alice", "uid": 2001}]},
    "slurm_operators: alice is absent in ictx_users": {"slurm_operators": ["alice", "ictx-metrics"], "ictx_users": [{"name": "alice", "uid": 2001, "state": "absent"}]},
    "slurm_operators: lacks ictx-metrics, which collects": {"slurm_operators": ["alice"], "ictx_users": [{"name": "alice", "uid": 2001}]},
    "slurm_topology: l1 is below s1 and below s2: a tree has one parent": {
        "slurm_topology": [{"name": "l1", "nodes": "n[1-2]"}, {"name": "s1", "switches": ["l1"]}, {"name": "s2", "switches": ["l1"]}]},
    "slurm_topology: b is below itself: remove it from switches of a": {
        "slurm_topology": [{"name": "l", "nodes": "n[1-2]"}, {"name": "a", "switches": ["b"]}, {"name": "b", "switches": ["a", "l"]}]},
    "slurm_accounts: physics: grp_tres has memory, which neither a node nor SLURM has": account(grp_tres={"memory": "8G"}),
    "slurm_qos: high has the unknown flag DenyOnLimits; did you mean DenyOnLimit?": qos(flags=["DenyOnLimits"]),
    "slurm_qos: high preempts itself, through high: remove one preempt": {**qos(preempt=["high"]), "slurm_preempt_type": "qos"},
    "slurm_qos: normal preempts itself, through high, normal: remove one preempt": {
        "slurm_preempt_type": "qos", "slurm_qos": [{"name": "normal", "preempt": ["HIGH"]}, {"name": "high", "preempt": ["normal"]}]},
    "slurm_accounts: physics: default_qos high is not one of its qos (normal): add it there": account(qos=["normal"], default_qos="high"),
    "slurm_accounts: 4you begins with a digit, which sacctmgr parses as a number: rename it": {"slurm_accounts": [{"name": "4you"}]},
    "slurm_accounts: ICTX is slurm_account, the account of every user: it cannot be absent": {"slurm_accounts": [{"name": "ICTX", "state": "absent"}]},
    "slurm_qos: normal is the default of jobs: it cannot be absent": {"slurm_qos": [{"name": "normal", "state": "absent"}]},
    "slurm_partitions: is empty, so that no job can run": {"slurm_partitions": []},
    "slurm_real_memory_mb (n1): 900 exceeds the node's memory in slurm_node_groups (500): SLURM would drain it": {
        "slurm_real_memory_mb": 900, "slurm_node_groups": [{"name": "a", "nodes": "n[1-2]", "cpus": 8, "memory_mb": 500}]},
    "slurm_jobs_cpus_per_node: 64 CPUs on each of 1 nodes, but the partition batch has at most 8 a node: jobs would never start": {
        "slurm_jobs_cpus_per_node": 64, "slurm_node_groups": [{"name": "a", "nodes": "n[1-2]", "cpus": 8, "memory_mb": 500}]},
    "slurm_slurmd_restart_seconds: 0 must be longer than slurm_slurmd_timeout (300)": {"slurm_slurmd_restart_seconds": 0},
    "slurm_slurmd_restart_seconds: 60 must be longer than slurm_slurmd_timeout (300)": {"slurm_slurmd_restart_seconds": 60},
    "nvidia_driver_mig (n1): 4g.20gb, 4g.20gb are 8 slices of a GPU that has 7: remove some": mig(([0], ["4g.20gb", "4g.20gb"])),
    "nvidia_driver_mig (n1): GPU 0 is in more than one entry: keep it in one": mig(([0], ["3g.20gb"]), ([0], ["1g.5gb"])),
    "nvidia_driver_mig (n2): GPU 1 is in more than one entry": mig(([], ["3g.20gb"]), ([1], ["1g.5gb"])),
    "slurm_gres (n1): gpu:h100 and gpu:a100 both have /dev/nvidia3: remove it from one": {
        "slurm_gres": [GPU, {**GPU, "type": "h100", "count": 2, "file": "/dev/nvidia[3-4]"}]},
    "slurm_private_tmp_dir: /shared/tmp is on the shared directory (/shared): use a folder of a local disk": {"slurm_private_tmp_dir": "/shared/tmp"},
    "slurm_private_tmp_dir: /tmp is the system's, or emptied by a reboot: use a separate folder": {"slurm_private_tmp_dir": "/tmp"},
    "slurm_state_dir: /run/slurm is the system's, or emptied by a reboot": {"slurm_state_dir": "/run/slurm"},
    "slurm_state_dir: /shared is the shared directory itself": {"slurm_state_dir": "/shared"},
    "slurm_health_disks: 2 items have the path /": {"slurm_health_disks": [{"path": "/", "min_free_mb": 1}, {"path": "/", "min_free_mb": 5}]},
    "slurm_config: SlurmdPort is 7000, but the platform requires 6818: remove it": {"slurm_config": {"SlurmdPort": 7000}},
    "slurm_config: SlurmUser is None, but the platform requires slurm": {"slurm_config": {"SlurmUser": None}},
    "slurm_config: accountingstoragetype is accounting_storage/none, but": {"slurm_config": {"accountingstoragetype": "accounting_storage/none"}},
    "slurm_config: MaxJobCuont is not a key of SLURM; did you mean MaxJobCount?": {"slurm_config": {"MaxJobCuont": 5}},
    "slurm_cgroup_config: ConstrainCore is not a key of SLURM; did you mean ConstrainCores?": {"slurm_cgroup_config": {"ConstrainCore": True}},
    "slurm_config: 2 keys are maxjobcount, and SLURM ignores case": {"slurm_config": {"MaxJobCount": 5, "maxjobcount": 6}},
    "slurm_node_groups: 2 groups are named a, ignoring case: rename one": {
        "slurm_node_groups": [{"name": name, "nodes": node, "cpus": 1, "memory_mb": 1} for name, node in (("A", "n1"), ("a", "n2"))]},
    "slurm_jobs_pretrain_config: pretrain/ictx-1bb.yaml is not in workload/configs, which images contain; did you mean pretrain/ictx-1b.yaml?": {
        "slurm_jobs_pretrain_config": "pretrain/ictx-1bb.yaml"},
    "slurm_jobs_stages: sft: sft/none.yaml is not in workload/configs": {"slurm_jobs_stages": {"sft": {"config": "sft/none.yaml", "after": "pretrain"}}},
}  # fmt: skip


@pytest.mark.parametrize("variables", RIGHT.values(), ids=RIGHT)
def test_what_slurm_takes_passes(variables: dict[str, Any]) -> None:
    assert found(**variables) == []


@pytest.mark.parametrize(("text", "variables"), WRONG.items())
def test_what_slurm_refuses_is_named_with_what_to_do(text: str, variables: dict[str, Any]) -> None:
    lines = found(**variables)
    assert [line for line in lines if line.startswith(text)], lines


@pytest.mark.parametrize(
    ("host", "name", "value"),
    [
        ("login1", "slurm_partitions", [{"name": "other", "default": True}]),
        ("ctl2", "slurm_slurmd_timeout", 200),
        ("n2", "slurm_process_tracking", "linuxproc"),
    ],
)
def test_what_all_files_of_slurm_have_in_common_does_not_differ_by_host(host: str, name: str, value: Any) -> None:
    (line,) = found({host: {name: value}})
    assert line.startswith(f"{name}: differs on ")
    assert host in line
    assert line.endswith(": set it for the group slurm, or for all")
    # Compute nodes do not write slurm.conf.
    assert found({"n1": {"slurm_slurmd_timeout": 200}}) == []
