"""Ansible filters: hardware of compute nodes for slurm.conf: from the inventory, otherwise as slurmd reports it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import yaml
from ansible.plugins.loader import filter_loader

Hardware = dict[str, Any]
"""sockets, cores_per_socket, threads_per_core (or cpus alone), memory_mb; gres, features and weight where declared."""

TOPOLOGY = {
    "sockets": "Sockets",
    "cores_per_socket": "CoresPerSocket",
    "threads_per_core": "ThreadsPerCore",
    "cpus": "CPUs",
}
# Equal machines report slightly different memory sizes; without rounding, each would be a kind of its own.
MEASURED_STEP_MB = 1024
STEPS_FROM_MB = 65536
BRANDS = {"nvidia", "tesla", "geforce", "quadro"}


def _filter(name: str) -> Callable[..., Any]:
    return filter_loader.get(name).j2_function  # type: ignore[no-any-return]


def reported_hardware(report: str) -> Hardware:
    """Returns the hardware in what `slurmd -C` prints, or in a line NodeName= of slurm.conf; empty if there is none.

    Only numbers are used. SLURM rejects a topology whose product is not the number of CPUs, as on processors with two
    kinds of cores: for such a node, only the CPUs are returned.
    """
    numbers = {key: int(value) for key, value in re.findall(r"(?<!\S)(\w+)=(\d{1,12})(?!\S)", report)}
    sockets = numbers.get("SocketsPerBoard", numbers.get("Sockets", 0)) * max(numbers.get("Boards", 1), 1)
    cores, threads = numbers.get("CoresPerSocket", 1), numbers.get("ThreadsPerCore", 1)
    cpus = numbers.get("CPUs", sockets * cores * threads)
    if not cpus or "RealMemory" not in numbers:
        return {}
    fits = cpus in (sockets * cores * threads, sockets * cores)
    return (dict(zip(TOPOLOGY, (sockets, cores, threads), strict=False)) if fits else {"cpus": cpus}) | {
        "memory_mb": numbers["RealMemory"]
    }


def over(lower: Hardware, upper: Hardware) -> Hardware:
    """Returns a node's description with the values of another on top; a topology is replaced as a whole."""
    dropped = TOPOLOGY.keys() if TOPOLOGY.keys() & upper.keys() else ()
    return {key: value for key, value in lower.items() if key not in dropped} | upper


def by_node(entries: Iterable[Mapping[str, Any]]) -> dict[str, Hardware]:
    """Returns the entries of slurm_node_groups or slurm_measured_nodes by node."""
    found: dict[str, Hardware] = {}
    for entry in entries:
        own = {key: value for key, value in entry.items() if key not in ("name", "nodes")}
        found |= dict.fromkeys(_listed(entry["nodes"]), own)
    return found


def declared_hardware(own: Mapping[str, Any], group: Hardware, measured: Hardware) -> dict[str, Hardware]:
    """Returns a node's declared hardware by variable, without keys that another variable overrides.

    Args:
        own: the node's variables.
        group: its entry of slurm_node_groups, as by_node returns them.
        measured: its entry of slurm_measured_nodes.
    """
    memory = int(own.get("slurm_real_memory_mb") or 0)
    layers = {
        "slurm_real_memory_mb": {"memory_mb": memory} if memory else {},
        "slurm_node_groups": group,
        "slurm_gres": {"gres": own["slurm_gres"]} if own.get("slurm_gres") else {},
        "slurm_measured_nodes": measured,
    }
    found, above = {}, set[str]()
    for variable, layer in layers.items():
        hidden = above | (TOPOLOGY.keys() if above & TOPOLOGY.keys() else set())
        found[variable] = {key: value for key, value in layer.items() if key not in hidden}
        above |= layer.keys()
    return {variable: layer for variable, layer in found.items() if layer}


def hardware_problems(declared: Mapping[str, Any], report: str) -> list[tuple[str, Any, Any]]:
    """Returns the keys of which more is declared than the node reports, each with both values.

    Fewer are allowed, as are other sockets with the same total of cores: SLURM treats them alike.

    Args:
        declared: its hardware in the inventory.
        report: what `slurmd -C` prints there, else `lscpu` and the line MemTotal of /proc/meminfo; `missing DEVICE` for
            each device of its generic resources that does not exist, and `gpus NUMBER`, what is on its PCI bus.
    """
    there = reported_hardware(report) or _listed_hardware(report)
    cores, found_cores = (int(one.get("sockets", 0)) * int(one.get("cores_per_socket", 0)) for one in (declared, there))
    there.setdefault("cpus", found_cores * there.get("threads_per_core", 1))
    found = []
    for key in (*TOPOLOGY, "memory_mb"):
        value, limit = int(declared.get(key, 0)), there.get(key, 0)
        same = key in ("sockets", "cores_per_socket") and cores <= found_cores
        if limit and value > limit and not same:
            found.append((key, value, limit))
    threads = int(declared.get("threads_per_core", 1))
    if not found_cores and there["cpus"] and cores * threads > there["cpus"]:
        found.append(("sockets * cores_per_socket * threads_per_core", cores * threads, there["cpus"]))
    return found + _gres_problems(declared.get("gres", []), report)


def _listed_hardware(report: str) -> Hardware:
    """Returns the hardware in what `lscpu` prints and in MemTotal."""
    names = dict(zip(TOPOLOGY, ("Socket(s)", "Core(s) per socket", "Thread(s) per core"), strict=False))
    found = {key: re.search(rf"^{re.escape(name)}: +(\d+)$", report, re.MULTILINE) for key, name in names.items()}
    memory = re.search(r"^MemTotal: +(\d+) kB$", report, re.MULTILINE)
    numbers = {key: int(match[1]) for key, match in found.items() if match}
    # lscpu shows no sockets on processors with core clusters and on some virtual machines.
    if len(numbers) < len(names):
        cpus = re.search(r"^CPU\(s\): +(\d+)$", report, re.MULTILINE)
        numbers = {"cpus": int(cpus[1])} if cpus else {}
    return numbers | ({"memory_mb": int(memory[1]) // 1024} if memory else {})


def _gres_problems(resources: Iterable[Mapping[str, Any]], report: str) -> list[tuple[str, Any, Any]]:
    missing = set(re.findall(r"^missing (\S+)$", report, re.MULTILINE))
    # The GPU's device files are created by the driver, which may not be installed yet.
    undriven = int((re.findall(r"^gpus (\d+)$", report, re.MULTILINE) or [0])[0])
    found = []
    for gres in resources:
        files = _listed(gres.get("file") or [])
        gone = [file for file in files if file in missing]
        gpus = all(re.fullmatch(r"/dev/nvidia\d+", file) for file in files)
        if gone and not (gpus and undriven >= len(files)):
            have = max(len(files) - len(gone), undriven if gpus else 0)
            found.append((f"count of {gres['name']}:{gres['type']}", len(files), have))
    return found


def _listed(nodes: str | Sequence[str]) -> list[str]:
    return [name for part in ([nodes] if isinstance(nodes, str) else nodes) for name in _filter("expand_nodes")(part)]


def _in_force(conf: str) -> dict[str, Hardware]:
    """Returns the nodes of a slurm.conf; their memory is without what is reserved for the system."""
    found: dict[str, Hardware] = {}
    for line in re.findall(r"^NodeName=.*$", conf, re.MULTILINE):
        own = reported_hardware(line)
        if own:
            own["jobs_memory_mb"] = own.pop("memory_mb")
            found |= dict.fromkeys(_listed(line.split()[0].partition("=")[2]), own)
    return found


def defined_nodes(conf: str) -> dict[str, list[str]]:
    """Returns each node's values in a slurm.conf, independent of how its lines group them."""
    found: dict[str, list[str]] = {}
    for line in re.findall(r"^NodeName=.*$", conf, re.MULTILINE):
        words = dict(word.split("=", 1) for word in line.split())
        names = _listed(words.pop("NodeName"))
        addresses = _listed(words.pop("NodeAddr")) if "NodeAddr" in words else names
        rest = sorted("=".join(word) for word in words.items())
        found |= {name: [address, *rest] for name, address in zip(names, addresses, strict=False)}
    return found


def _memory(hardware: Hardware, reserved_mb: int) -> int:
    """Returns the memory for jobs; nothing is reserved on a node with less than twice the reserve."""
    if "memory_mb" not in hardware:
        return int(hardware["jobs_memory_mb"])
    memory = int(hardware["memory_mb"])
    return memory - reserved_mb if memory >= 2 * reserved_mb else memory


def compute_nodes(
    names: Iterable[str],
    hostvars: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    measured: Sequence[Mapping[str, Any]],
    conf: str,
    reserved_mb: int,
) -> dict[str, list[Any]]:
    """Returns the kinds of nodes, and the names of nodes whose hardware is unknown.

    Precedence: the node's group, its `slurm_gres`, measured values, what it reports now, the slurm.conf in force.

    Args:
        names: compute nodes by inventory name.
        hostvars: variables of all hosts; `_slurm_reported` is a registered `slurmd -C`.
        groups: slurm_node_groups.
        measured: slurm_measured_nodes.
        conf: the slurm.conf in force: an unreachable node that is not declared keeps its values there.
        reserved_mb: memory kept for the system on a node without slurm_reserved_memory_mb, in MB.

    Returns:
        `kinds`: nodes and addresses (hostlists in the same order; addresses are empty where all nodes are reached by
        their names), topology (text), memory_mb (of jobs), gres, features and weight; `unknown`: names.
    """
    by_group, by_measure, in_force = by_node(groups), by_node(measured), _in_force(conf)
    address_of, compress = _filter("host_address"), _filter("compress_nodes")
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    unknown = []
    for name in _filter("sort_nodes")(names):
        own = hostvars[name]
        found = dict(by_measure.get(name, {}))
        if own.get("slurm_gres"):
            found["gres"] = own.get("slurm_gres")
        found = over(found, by_group.get(name, {}))
        if not (TOPOLOGY.keys() & found.keys() and "memory_mb" in found):
            reported = reported_hardware(str((own.get("_slurm_reported") or {}).get("stdout", "")))
            found = over(reported or in_force.get(name, {}), found)
        memory = int(own.get("slurm_real_memory_mb") or 0)
        if not TOPOLOGY.keys() & found.keys() or not (memory or {"memory_mb", "jobs_memory_mb"} & found.keys()):
            unknown.append(name)
            continue
        kind = {
            "topology": " ".join(f"{text}={int(found[key])}" for key, text in TOPOLOGY.items() if key in found),
            "memory_mb": memory or _memory(found, int(own.get("slurm_reserved_memory_mb") or reserved_mb)),
            "gres": found.get("gres", []),
            "features": found.get("features", []),
            "weight": int(found.get("weight", 1)),
        }
        kinds[json.dumps(kind, sort_keys=True)].append((name, address_of(name, hostvars)))
    return {
        "kinds": [
            json.loads(kind)
            | {
                "nodes": compress(name for name, _ in nodes),
                "addresses": compress(at for _, at in nodes) if any(name != at for name, at in nodes) else "",
            }
            for kind, nodes in kinds.items()
        ],
        "unknown": unknown,
    }


def partition_nodes(nodes: str | Sequence[str], unknown: Sequence[str]) -> str:
    """Returns a partition's nodes as a hostlist, without those whose hardware is unknown."""
    parts = [nodes] if isinstance(nodes, str) else [str(node) for node in nodes]
    if not unknown or any(part.upper() == "ALL" for part in parts):
        return ",".join(parts)
    left = [name for name in _listed(parts) if name not in unknown]
    return str(_filter("compress_nodes")(left))


def gpu_resources(report: str) -> list[dict[str, Any]]:
    """Returns the GPUs in the form of slurm_gres, from `nvidia-smi --query-gpu=index,name --format=csv,noheader`."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for index, name in re.findall(r"^(\d+), *(.+?)\s*$", report, re.MULTILINE):
        kinds[_gpu_type(name)].append(f"/dev/nvidia{index}")
    return [
        {"name": "gpu", "type": kind, "count": len(files), "file": _filter("compress_nodes")(files)}
        for kind, files in kinds.items()
    ]


def _gpu_type(name: str) -> str:
    """Returns a model's short name: a100 for NVIDIA A100-SXM4-80GB, rtx4090 for NVIDIA GeForce RTX 4090."""
    words = [word for word in re.findall(r"[a-z0-9]+", name.lower()) if word not in BRANDS]
    first = next((number for number, word in enumerate(words) if re.search(r"\d", word)), len(words))
    return "".join(words[: first + 1]) or "gpu"


def measured_nodes(
    before: Sequence[Mapping[str, Any]],
    names: Iterable[str],
    hostvars: Mapping[str, Any],
    answered: Iterable[str],
) -> str:
    """Returns slurm_measured_nodes as YAML: new values of nodes that responded, previous values of the others.

    Args:
        before: slurm_measured_nodes of the existing file.
        names: compute nodes of the inventory; other nodes are removed.
        hostvars: variables of all hosts, with the registered `_measure_slurmd` and `_measure_gpus`.
        answered: nodes that responded.
    """
    found = by_node(before)
    for name in answered:
        reports = [str(hostvars[name].get(f"_measure_{part}", {}).get("stdout", "")) for part in ("slurmd", "gpus")]
        hardware, gpus = reported_hardware(reports[0]), gpu_resources(reports[1])
        if not hardware:
            continue
        if hardware["memory_mb"] >= STEPS_FROM_MB:
            hardware["memory_mb"] -= hardware["memory_mb"] % MEASURED_STEP_MB
        found[name] = hardware | ({"gres": gpus} if gpus else {})
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in _filter("sort_nodes")(names):
        if name in found:
            kinds[json.dumps(found[name])].append(name)
    entries = [{"nodes": _filter("compress_nodes")(nodes)} | json.loads(kind) for kind, nodes in kinds.items()]
    text = yaml.dump({"slurm_measured_nodes": entries}, Dumper=_Indented, sort_keys=False, width=130)
    return str(text).rstrip()


class _Indented(yaml.SafeDumper):
    """Indents lists like this repository's files."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indents every list."""
        super().increase_indent(flow, False)


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {
            "compute_nodes": compute_nodes,
            "declared_hardware": declared_hardware,
            "defined_nodes": defined_nodes,
            "hardware_problems": hardware_problems,
            "measured_nodes": measured_nodes,
            "node_hardware": by_node,
            "partition_nodes": partition_nodes,
        }
