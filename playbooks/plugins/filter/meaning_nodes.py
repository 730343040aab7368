"""Ansible filter: rules of preflight (meaning.py) about compute nodes' hardware: groups, GPUs, MIG, memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ansible.plugins.loader import filter_loader

Problem = tuple[str, str, str]


def node_groups(site: Any) -> Iterator[Problem]:
    """Groups have existing nodes, each node is in one group, and the declared hardware is complete and consistent."""
    seen: dict[str, str] = {}
    for name, count in Counter(str(group["name"]).lower() for group in site.get("slurm_node_groups", [])).items():
        if count > 1:
            yield "slurm_node_groups", f"{count} groups are named {name}, ignoring case: rename one", ""
    for group in site.get("slurm_node_groups", []):
        name = group["name"]
        try:
            listed = site.listed(group)
        except ValueError as error:
            yield "slurm_node_groups", f"{name}: {error}", ""
            continue
        nodes = dict.fromkeys(listed)
        yield from site.strangers("slurm_node_groups", name, nodes)
        for node in nodes:
            if node in seen:
                yield "slurm_node_groups", f"{node} is in {seen[node]} and in {name}: remove it from one", ""
            seen.setdefault(node, name)
        shape = [key for key in ("sockets", "cores_per_socket", "threads_per_core") if key in group]
        if shape and (len(shape) < 3 or "cpus" in group):
            text = f"{name} needs sockets, cores_per_socket and threads_per_core, or cpus alone"
            yield "slurm_node_groups", text, ""
        yield from _gres_problems(site, "slurm_node_groups", f"{name}: ", group.get("gres", []), "")


def _gres_problems(
    site: Any, where: str, prefix: str, given: Sequence[Mapping[str, Any]], host: str
) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for (name, kind), count in Counter((gres["name"], gres.get("type")) for gres in given).items():
        if count > 1:
            yield where, f"{prefix}{count} items are {name}:{kind}: merge them and add their counts", host
    for gres in given:
        try:
            devices = site.nodes(gres["file"]) if gres.get("file") else []
        except ValueError as error:
            yield where, f"{prefix}{error}", host
            continue
        what, several = f"{gres['name']}:{gres.get('type')}", gres.get("devices") or []
        if devices and several:
            yield where, f"{prefix}{what} has file and devices: keep one", host
        elif several and len(several) != int(gres["count"]):
            text = f"{prefix}{what} has the count {gres['count']}, but {len(several)} devices"
            yield where, text, host
        if devices and len(devices) != int(gres["count"]):
            text = f"{prefix}{what} has the count {gres['count']}, but {gres['file']} is {len(devices)} devices"
            yield where, text, host
        for device in devices:
            if device in seen:
                yield where, f"{prefix}{what} and {seen[device]} both have {device}: remove it from one", host
            seen.setdefault(device, what)


def resources(site: Any) -> Iterator[Problem]:
    """A node has as many devices as it offers, and memory left for jobs."""
    for host in site.hosts("slurm_compute"):
        yield from _gres_problems(site, "slurm_gres", "", site.of(host, "slurm_gres", []) or [], host)
        real, reserved = (int(site.of(host, f"slurm_{kind}_memory_mb") or 0) for kind in ("real", "reserved"))
        if real and reserved >= real:
            yield "slurm_reserved_memory_mb", f"{reserved} leaves no memory of slurm_real_memory_mb ({real})", host
        if site.gpus(host) and host in {*site.hosts("k3s_agent"), *site.hosts("k3s_server")}:
            text = "has GPUs for jobs (slurm_gres) and is a node of Kubernetes: two schedulers would allocate the same"
            yield f"host {host}", text, ""


def mig(site: Any) -> Iterator[Problem]:
    """SLURM allocates the MIG devices of a divided GPU, no more than exist, and never the GPU itself."""
    for host in site.hosts("slurm_compute"):
        divided = [entry for entry in site.of(host, "nvidia_driver_mig") or [] if entry.get("profiles")]
        every = any(not entry.get("gpus") for entry in divided)
        cards = {int(number) for entry in divided for number in entry.get("gpus") or []}
        made = Counter(each for entry in divided for each in entry["profiles"] for _ in entry.get("gpus") or [0])
        for gres in site.gres(host) if divided else []:
            what = f"{gres['name']}:{gres['type']}"
            for file in site.nodes(gres["file"]) if gres.get("file") else []:
                number = re.fullmatch(r"/dev/nvidia(\d+)", file)
                if number and (every or int(number[1]) in cards):
                    text = f"{what} has {file}, which nvidia_driver_mig divides: list its MIG devices in devices"
                    yield "slurm_gres", text, host
            profile = str(gres["type"]).rpartition("_")[2]
            if gres.get("devices") and profile not in made:
                text = f"{what} has devices, but nvidia_driver_mig creates {', '.join(sorted(made))}: set one as type"
                yield "slurm_gres", text, host
            elif gres.get("devices") and not every and int(gres["count"]) > made[profile]:
                text = f"{what} has the count {gres['count']}, but nvidia_driver_mig creates {made[profile]}"
                yield "slurm_gres", text, host


def divided(site: Any) -> Iterator[Problem]:
    """A GPU is divided by one entry, into at most its seven slices."""
    for host in site.hosts("all"):
        seen: Counter[Any] = Counter()
        for entry in site.of(host, "nvidia_driver_mig") or []:
            profiles = entry.get("profiles") or []
            parts = [int(found[1]) for profile in profiles if (found := re.match(r"(\d)g\.", profile))]
            if sum(parts) > 7:
                text = f"{', '.join(profiles)} are {sum(parts)} slices of a GPU that has 7: remove some"
                yield "nvidia_driver_mig", text, host
            seen.update({int(number) for number in entry.get("gpus") or []} or {"every GPU"})
        for number, count in seen.items():
            if count > 1 or (number != "every GPU" and seen["every GPU"]):
                what = "every GPU" if number == "every GPU" else f"GPU {number}"
                yield "nvidia_driver_mig", f"{what} is in more than one entry: keep it in one", host


def hardware(site: Any) -> Iterator[Problem]:
    """No node offers more memory than its group declares; slurmd restarts only after SLURM marked its node down."""
    groups = filter_loader.get("node_hardware").j2_function(site.get("slurm_node_groups", []))
    for host in site.hosts("slurm_compute"):
        real, there = int(site.of(host, "slurm_real_memory_mb") or 0), int(groups.get(host, {}).get("memory_mb") or 0)
        if there and real > there:
            text = f"{real} exceeds the node's memory in slurm_node_groups ({there}): SLURM would drain it"
            yield "slurm_real_memory_mb", text, host
    restart, timeout = (site.get(f"slurm_slurmd_{name}") for name in ("restart_seconds", "timeout"))
    if restart is not None and timeout and int(restart) <= int(timeout):
        text = f"{restart} must be longer than slurm_slurmd_timeout ({timeout}): slurmd may find requeued jobs"
        yield "slurm_slurmd_restart_seconds", text, ""


def rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return (node_groups, resources, mig, divided, hardware)


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"meaning_nodes": rules}
