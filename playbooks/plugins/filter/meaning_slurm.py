"""Ansible filter: rules of preflight (meaning.py) about SLURM's files and controllers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Problem = tuple[str, str, str]

PLATFORM = Path(__file__).resolve().parents[3]
OWNED = {
    "nodename": "slurm_node_groups",
    "partitionname": "slurm_partitions",
    "slurmctldhost": "the group slurm_controller",
    "clustername": "ictx_cluster_name",
    "statesavelocation": "slurm_state_dir",
}
# Settings that the platform depends on.
FIXED = {
    "accountingstoragetype": "accounting_storage/slurmdbd",
    "authtype": "auth/munge",
    "slurmctldport": "6817",
    "slurmdport": "6818",
    "slurmuser": "slurm",
}
# Variables in slurm.conf, which every controller and login node renders.
WRITTEN = (
    "account",
    "config",
    "credential_seconds",
    "first_job_id",
    "health",
    "health_interval",
    "kill_wait",
    "measured_nodes",
    "native_metrics",
    "node_groups",
    "partitions",
    "preempt_grace_seconds",
    "preempt_mode",
    "preempt_type",
    "priority_half_life",
    "priority_max_age",
    "priority_weights",
    "private_data",
    "propagate_limits",
    "slurmd_timeout",
    "state_dir",
    "topology",
    "topology_type",
)


def settings(site: Any) -> Iterator[Problem]:
    """slurm_config does not set keys that other variables set, or that the platform depends on."""
    for key, value in site.get("slurm_config", {}).items():
        right = FIXED.get(key.lower())
        if right and str(value).lower() != right:
            yield "slurm_config", f"{key} is {value}, but the platform requires {right}: remove it", ""
        if key.lower() in OWNED:
            yield "slurm_config", f"{key} must be set by {OWNED[key.lower()]}", ""


def controllers(site: Any) -> Iterator[Problem]:
    """Controllers share their state, and process tracking supports the features in use."""
    hosts, shared = site.hosts("slurm_controller"), site.get("ictx_shared_dir")
    state = site.get("slurm_state_dir", "/var/lib/slurm/slurmctld")
    if len(hosts) > 1 and shared and not f"{state}/".startswith(f"{str(shared).rstrip('/')}/"):
        yield (
            "slurm_state_dir",
            f"{state} is not shared, but there are {len(hosts)} controllers: move it below {shared}, or the backup "
            "starts without jobs",
            "",
        )
    for host in site.hosts("slurm_compute"):
        for name in ("slurm_pam_adopt", "slurm_private_tmp"):
            if site.of(host, name) is True and site.of(host, "slurm_process_tracking") == "linuxproc":
                yield name, "needs cgroups: set slurm_process_tracking: cgroup", host
    count = len(site.hosts("k3s_server"))
    if count and count % 2 == 0 and site.get("kubernetes_distribution", "auto") in ("auto", "k3s"):
        text = f"has {count} hosts: etcd tolerates the loss of fewer than half, so use {count - 1} or {count + 1}"
        yield "group k3s_server", text, ""


@cache
def _keys() -> Mapping[str, list[str]]:
    content: Mapping[str, list[str]] = yaml.safe_load((PLATFORM / "playbooks/plugins/slurm_keys.yml").read_text())
    return content


def keys(site: Any) -> Iterator[Problem]:
    """Keys of SLURM's files exist, and are set once."""
    for where, known in _keys().items():
        given = list(site.get(where) or {})
        for key in given:
            near = get_close_matches(key.lower(), [name.lower() for name in known], n=1, cutoff=0.85)
            if near and near[0] != key.lower():
                yield where, f"{key} is not a key of SLURM{site.hint(key, known)}", ""
        for key, count in Counter(map(str.lower, given)).items():
            if count > 1:
                yield where, f"{count} keys are {key}, and SLURM ignores case: keep one", ""


def same(site: Any) -> Iterator[Problem]:
    """Values that all of SLURM's configuration files must share are the same on all of its hosts."""
    writers = dict.fromkeys([*site.hosts("slurm_controller"), *site.hosts("slurm_login")])
    everywhere = dict.fromkeys(site.hosts("slurm"))
    for name in (*WRITTEN, "process_tracking"):
        found: dict[str, list[str]] = {}
        for host in everywhere if name == "process_tracking" else writers:
            value = site.of(host, f"slurm_{name}")
            if value is not None:
                found.setdefault(repr(value), []).append(host)
        if len(found) > 1:
            hosts = " and on ".join(f"{at[0]}{' and others' if len(at) > 1 else ''}" for at in list(found.values())[:2])
            yield f"slurm_{name}", f"differs on {hosts}: set it for the group slurm, or for all", ""


def rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return (settings, controllers, keys, same)


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"meaning_slurm": rules}
