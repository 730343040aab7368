"""Ansible filter: rules of preflight (meaning.py) about partitions, and the platform's own jobs in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

Problem = tuple[str, str, str]

PLATFORM = Path(__file__).resolve().parents[3]


def minutes(text: str) -> float:
    """Returns a time limit of SLURM in minutes: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, mins, seconds = [*parts, 0, 0][:3]
        return int(days) * 1440 + hours * 60 + mins + seconds / 60
    hours, mins, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return hours * 60 + mins + seconds / 60


def partitions(site: Any) -> Iterator[Problem]:
    """Partitions have nodes that exist; one is the default; their QOS exist."""
    compute, known = site.hosts("slurm_compute"), {qos["name"].lower() for qos in site.kept("slurm_qos")}
    given = site.get("slurm_partitions", [])
    for partition in given:
        name = partition["name"]
        try:
            found = site.listed(partition)
        except ValueError as error:
            yield "slurm_partitions", f"{name}: {error}", ""
            continue
        if not found and compute:
            yield "slurm_partitions", f"{name} has no nodes: list some, or set nodes: ALL", ""
        yield from site.strangers("slurm_partitions", name, dict.fromkeys(found))
        for node, count in Counter(found).items():
            if count > 1:
                yield "slurm_partitions", f"{name} has the node {node} {count} times", ""
        for qos in partition.get("allow_qos", []) if known else []:
            if qos.lower() not in known:
                hint = site.close(qos, [*known])
                yield "slurm_partitions", f"{name} allows the QOS {qos}, which is not in slurm_qos{hint}", ""
    defaults = [partition["name"] for partition in given if partition.get("default") in (True, "true", "yes")]
    if len(defaults) > 1:
        yield "slurm_partitions", f"{' and '.join(defaults)} are both the default: keep one", ""


def jobs(site: Any) -> Iterator[Problem]:
    """The platform's own jobs fit into their partitions."""
    known = {partition["name"]: partition for partition in site.get("slurm_partitions", [])}
    if not known:
        return
    common = {
        name: site.get(f"slurm_jobs_{name}")
        for name in ("partition", "nodes", "gpus_per_node", "cpus_per_node", "time", "grace_seconds")
    }
    yield from _job(site, "slurm_jobs_", common, known)
    for stage, about in site.get("slurm_jobs_stages", {}).items():
        own = {name: about[name] for name in common if name in about}
        # Stages without training use one node, as in filter/stages.py.
        single = {} if about.get("kind", stage) in ("pretrain", "extend", "sft", "dpo") else {"nodes": 1}
        if own:
            yield from _job(site, f"slurm_jobs_stages: {stage}: ", common | single | own, known)


def _job(site: Any, where: str, job: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[Problem]:
    name = str(job["partition"] or next(iter(known)))
    if name not in known:
        yield f"{where}partition", f"partition {name} is not in slurm_partitions, which has {site.one_of([*known])}", ""
        return
    compute, limit = site.hosts("slurm_compute"), known[name].get("max_time", "UNLIMITED")
    try:
        hosts = [node for node in site.listed(known[name]) if node in compute]
    except ValueError:
        return
    if isinstance(job["time"], str) and isinstance(limit, str) and minutes(job["time"]) > minutes(limit):
        text = f"{job['time']} exceeds the limit of the partition {name} ({limit}): jobs would never start"
        yield f"{where}time", text, ""
    grace = int(job["grace_seconds"] or 0)
    if isinstance(job["time"], str) and grace >= minutes(job["time"]) * 60:
        yield f"{where}grace_seconds", f"{grace} is not less than slurm_jobs_time ({job['time']})", ""
    wanted, gpus = int(job["nodes"] or 1), int(job["gpus_per_node"] or 0)
    if wanted > len(hosts):
        yield f"{where}nodes", f"{wanted} nodes, but the partition {name} has {len(hosts)}: jobs would never start", ""
    elif gpus and sum(site.gpus(host) >= gpus for host in hosts) < wanted:
        most = max((site.gpus(host) for host in hosts), default=0)
        yield (
            f"{where}gpus_per_node",
            f"{gpus} GPUs on each of {wanted} nodes, but slurm_gres of the partition {name} has at most {most} a node",
            "",
        )
    cpus = int(job["cpus_per_node"] or 1)
    have = [_cpus(site, host) for host in hosts]
    if all(have) and wanted <= len(hosts) and sum(number >= cpus for number in have) < wanted:
        text = f"{cpus} CPUs on each of {wanted} nodes, but the partition {name} has at most {max(have)} a node"
        yield f"{where}cpus_per_node", f"{text}: jobs would never start", ""


def _cpus(site: Any, host: str) -> int:
    """Returns a node's declared number of CPUs; 0 if it is not declared."""
    for layer in site.hardware(host).values():
        if "cpus" in layer:
            return int(layer["cpus"])
        if "sockets" in layer:
            return int(layer["sockets"]) * int(layer["cores_per_socket"]) * int(layer["threads_per_core"])
    return 0


def files(site: Any) -> Iterator[Problem]:
    """Configurations of jobs exist in the image."""
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
            text = f"{name} is not in workload/configs, which images contain{site.hint(name, there)}"
            yield where, text, ""


def rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return (partitions, jobs, files)


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"meaning_jobs": rules}
