"""Ansible filter: rules of preflight (meaning.py) about what SLURM's programs would refuse."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from ansible.plugins.loader import filter_loader

Problem = tuple[str, str, str]

PLATFORM = Path(__file__).resolve().parents[3]
# Those of SLURM itself; further ones are gres/NAME of what nodes have, and license/NAME.
TRES = ("billing", "bb/datawarp", "cpu", "energy", "fs/disk", "fs/lustre", "ic/ofed", "mem", "node", "pages", "vmem")
QOS_FLAGS = (
    "DenyOnLimit",
    "EnforceUsageThreshold",
    "NoDecay",
    "NoReserve",
    "OverPartQOS",
    "PartitionMaxNodes",
    "PartitionMinNodes",
    "PartitionTimeLimit",
    "Relative",
    "RequiresReservation",
    "UsageFactorSafe",
)
# Variables that slurm.conf has, which controllers and login nodes each write.
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
# What is there only until the next start, or for nobody to write.
LOST = re.compile(
    r"/(boot|dev|etc|run|sys|tmp)(/.*)?|/(bin|home|lib|lib64|opt|root|sbin|srv|usr|var|var/lib|var/log|var/tmp)/?"
)


def _hint(word: str, known: list[str]) -> str:
    near = get_close_matches(word.lower(), [name.lower() for name in known], n=1, cutoff=0.7)
    return f"; did you mean {next(name for name in known if name.lower() == near[0])}?" if near else ""


def _kept(site: Any, name: str) -> list[Mapping[str, Any]]:
    return [entry for entry in site.get(name, []) if entry.get("state") != "absent"]


def limits(site: Any) -> Iterator[Problem]:
    """Limits are about resources that the accounting knows."""
    there = {str(gres["name"]) for host in site.hosts("slurm_compute") for gres in site.gres(host)}
    config = {key.lower(): value for key, value in (site.get("slurm_config") or {}).items()}
    more = config.get("accountingstoragetres") or []
    listed = [name.strip() for name in (more.split(",") if isinstance(more, str) else map(str, more))]
    known = [*TRES, *(f"gres/{name}" for name in sorted(there)), *listed]
    for where in ("slurm_qos", "slurm_accounts", "slurm_associations"):
        for entry in _kept(site, where):
            who = entry.get("name") or f"{entry['user']} in {entry['account']}"
            for key in (key for key in entry if "tres" in key):
                for name in entry[key]:
                    if name.lower() not in known and not name.lower().startswith("license/"):
                        hint = _hint(name, known) or f": take {', '.join(['cpu', 'mem', 'node', *known[len(TRES) :]])}"
                        yield where, f"{who}: {key} has {name}, which no node has and SLURM does not know{hint}", ""


def qualities(site: Any) -> Iterator[Problem]:
    """QOS have flags of SLURM, preempt each other in one direction, and are among those of who has one by default."""
    above: dict[str, list[str]] = {}
    for entry in _kept(site, "slurm_qos"):
        for flag in entry.get("flags", []):
            if flag.lower() not in map(str.lower, QOS_FLAGS):
                hint = _hint(flag, [*QOS_FLAGS]) or f": take {', '.join(QOS_FLAGS)}"
                yield "slurm_qos", f"{entry['name']} has the flag {flag}, which SLURM does not know{hint}", ""
        above[entry["name"].lower()] = [name.lower() for name in entry.get("preempt", [])]
    for name in above:
        reached, left = set[str](), list(above[name])
        while left:
            other = left.pop()
            left += [] if other in reached else above.get(other, [])
            reached.add(other)
        if name in reached:
            text = f"{name} preempts itself, through {', '.join(sorted(reached))}: take one preempt out"
            yield "slurm_qos", text, ""
    for where in ("slurm_accounts", "slurm_associations"):
        for entry in _kept(site, where):
            own, default = [name.lower() for name in entry.get("qos", [])], str(entry.get("default_qos") or "")
            if own and default and default.lower() not in own:
                who = entry.get("name") or f"{entry['user']} in {entry['account']}"
                yield where, f"{who}: default_qos {default} is not one of its qos ({', '.join(own)}): add it there", ""


def names(site: Any) -> Iterator[Problem]:
    """Names of accounts and QOS begin with a letter; what everybody uses stays."""
    for where, key in (("slurm_qos", "name"), ("slurm_accounts", "name"), ("slurm_associations", "account")):
        for name in dict.fromkeys(str(entry[key]) for entry in site.get(where, [])):
            if name[0].isdigit():
                yield where, f"{name} begins with a digit, which sacctmgr takes for a number: begin with a letter", ""
    needed = {"slurm_accounts": str(site.get("slurm_account", "ictx")).lower(), "slurm_qos": "normal"}
    for where, name in needed.items():
        for entry in site.get(where, []):
            if entry.get("state") == "absent" and entry["name"].lower() == name:
                what = (
                    "slurm_account, which every user is in"
                    if where == "slurm_accounts"
                    else "what jobs have that name none"
                )
                yield where, f"{entry['name']} is {what}: it cannot be absent", ""
    if site.get("slurm_partitions") == []:
        yield "slurm_partitions", "is empty, so that no job can run: have one, as {name: batch, default: true}", ""


def hardware(site: Any) -> Iterator[Problem]:
    """No node offers jobs more memory than its group has; slurmd starts again after its node was set down."""
    groups = filter_loader.get("node_hardware").j2_function(site.get("slurm_node_groups", []))
    for host in site.hosts("slurm_compute"):
        real, there = int(site.of(host, "slurm_real_memory_mb") or 0), int(groups.get(host, {}).get("memory_mb") or 0)
        if there and real > there:
            text = f"{real} is more than the node has by slurm_node_groups ({there}): SLURM would drain it"
            yield "slurm_real_memory_mb", text, host
    restart, timeout = (site.get(f"slurm_slurmd_{name}") for name in ("restart_seconds", "timeout"))
    if restart and timeout and int(restart) <= int(timeout):
        text = f"{restart} is not longer than slurm_slurmd_timeout ({timeout}): slurmd may find jobs that are requeued"
        yield "slurm_slurmd_restart_seconds", text, ""


def divided(site: Any) -> Iterator[Problem]:
    """A GPU is divided once, into no more than it has."""
    for host in site.hosts("all"):
        seen: Counter[Any] = Counter()
        for entry in site.of(host, "nvidia_driver_mig") or []:
            profiles = entry.get("profiles") or []
            parts = [int(found[1]) for profile in profiles if (found := re.match(r"(\d)g\.", profile))]
            if sum(parts) > 7:
                text = f"{', '.join(profiles)} are {sum(parts)} slices of a GPU that has 7: take some out"
                yield "nvidia_driver_mig", text, host
            seen.update({int(number) for number in entry.get("gpus") or []} or {"every GPU"})
        for number, count in seen.items():
            if count > 1 or (number != "every GPU" and seen["every GPU"]):
                what = "every GPU" if number == "every GPU" else f"GPU {number}"
                yield "nvidia_driver_mig", f"{what} is in more than one entry: leave it in one", host


def folders(site: Any) -> Iterator[Problem]:
    """SLURM's folders last, and what is of one node stays there."""
    shared = str(site.get("ictx_shared_dir") or "")
    below = f"{site.get('slurm_private_tmp_dir') or ''}/".startswith(f"{shared.rstrip('/')}/")
    if shared and below:
        text = (
            f"{site.get('slurm_private_tmp_dir')} is on the shared directory ({shared}): take a folder of a local disk"
        )
        yield "slurm_private_tmp_dir", text, ""
    for name in ("slurm_private_tmp_dir", "slurm_state_dir"):
        folder = str(site.get(name) or "")
        if folder and (LOST.fullmatch(folder) or folder.rstrip("/") == shared.rstrip("/")):
            what = (
                "the shared directory itself"
                if folder.rstrip("/") == shared.rstrip("/")
                else "the system's, or lost at a reboot"
            )
            yield name, f"{folder} is {what}: take a folder of its own, such as /var/lib/slurm/{name.split('_')[1]}", ""
    for path, count in Counter(disk["path"] for disk in site.get("slurm_health_disks", [])).items():
        if count > 1:
            yield "slurm_health_disks", f"{count} items have the path {path}", ""


@cache
def _keys() -> Mapping[str, list[str]]:
    content: Mapping[str, list[str]] = yaml.safe_load((PLATFORM / "playbooks/plugins/slurm_keys.yml").read_text())
    return content


def keys(site: Any) -> Iterator[Problem]:
    """Keys of SLURM's files are spelt as there, and stand once."""
    for where, known in _keys().items():
        given = list(site.get(where) or {})
        for key in given:
            near = get_close_matches(key.lower(), [name.lower() for name in known], n=1, cutoff=0.85)
            if near and near[0] != key.lower():
                yield where, f"{key} is no key of SLURM{_hint(key, known)}", ""
        for key, count in Counter(map(str.lower, given)).items():
            if count > 1:
                yield where, f"{count} keys are {key}, whatever their capitals, which SLURM ignores: leave one", ""


def same(site: Any) -> Iterator[Problem]:
    """What all files of SLURM must have in common is the same on all of its hosts."""
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


def files(site: Any) -> Iterator[Problem]:
    """Configurations that jobs begin with are those of the image."""
    if any(site.of(host, "slurm_jobs_image_dir") for host in site.hosts("all")):
        return
    root = PLATFORM / "workload/configs"
    wanted = {f"slurm_jobs_{name}_config": site.get(f"slurm_jobs_{name}_config") for name in ("pretrain", "sweep")}
    stages = {
        f"slurm_jobs_stages: {name}": about.get("config") for name, about in site.get("slurm_jobs_stages", {}).items()
    }
    for where, name in (wanted | stages).items():
        if name and root.is_dir() and not (root / name).is_file():
            there = sorted(str(file.relative_to(root)) for file in root.glob("*/*.yaml"))
            text = f"{name} is not in workload/configs, which images are made of{_hint(name, there)}"
            yield where, text, ""


RULES: tuple[Callable[[Any], Iterator[Problem]], ...] = (
    limits, qualities, names, hardware, divided, folders, keys, same, files
)  # fmt: skip


def slurm_rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return RULES


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"slurm_rules": slurm_rules}
