"""Ansible filter: checks values of an inventory against each other, once each has the right format.

The rules are in the files meaning_*.py, by subject; each file is a filter that returns its rules.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from ansible.plugins.loader import filter_loader

Problem = tuple[str, str, str]
"""The variable or group, what is wrong and what to do, and the host (empty: the whole cluster)."""

RULES = (
    "meaning_jobs", "meaning_accounts", "meaning_nodes", "meaning_topology", "meaning_slurm", "meaning_folders",
    "meaning_hosts", "meaning_addresses", "meaning_ports", "meaning_storage", "meaning_monitoring", "meaning_services",
    "meaning_packages", "meaning_charts",
)  # fmt: skip


class Inventory:
    """Groups, their hosts' variables, and helpers for the rules.

    A variable that depends on facts is unknown, which is None.
    """

    def __init__(self, values: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]]) -> None:
        self.groups, self._values = groups, values

    def hosts(self, group: str) -> list[str]:
        """Returns a group's hosts."""
        return list(self.groups.get(group, ()))

    def of(self, host: str, name: str, default: Any = None) -> Any:
        """Returns a host's variable."""
        return self._values.get(host, {}).get(name, default)

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a variable of the whole cluster: that of the first host which has it."""
        return next((values[name] for values in self._values.values() if values.get(name) is not None), default)

    def address(self, host: str) -> str:
        """Returns the address at which other hosts reach a host."""
        return str(self.of(host, "ictx_address") or self.of(host, "ansible_host", host))

    def hardware(self, host: str) -> dict[str, dict[str, Any]]:
        """Returns a compute node's declared hardware, by the variable that declares it."""
        by_group, by_measure = self._described
        declared = filter_loader.get("declared_hardware").j2_function
        own = {name: self.of(host, name) for name in ("slurm_gres", "slurm_real_memory_mb")}
        return dict(declared(own, by_group.get(host, {}), by_measure.get(host, {})))

    def gres(self, host: str) -> list[Mapping[str, Any]]:
        """Returns a node's generic resources: those of its group, its own, or those that were measured."""
        by_group, by_measure = self._described
        own = self.of(host, "slurm_gres") or by_measure.get(host, {}).get("gres") or []
        return list(by_group.get(host, {}).get("gres", own))

    def gpus(self, host: str) -> int:
        """Returns how many GPUs a node offers."""
        return sum(int(gres["count"]) for gres in self.gres(host) if gres["name"] == "gpu")

    def kept(self, name: str) -> list[Mapping[str, Any]]:
        """Returns a list's entries without those that are to be removed."""
        return [entry for entry in self.get(name, []) if entry.get("state") != "absent"]

    def listed(self, item: Mapping[str, Any]) -> list[str]:
        """Returns the nodes of a partition, group or switch. Raises ValueError for an invalid list."""
        given, compute = item.get("nodes", "ALL"), self.hosts("slurm_compute")
        parts = [given] if isinstance(given, str) else [str(part) for part in given]
        return [name for part in parts for name in (compute if part.upper() == "ALL" else self.nodes(part))]

    @staticmethod
    def nodes(text: str) -> list[str]:
        """Returns the names in a hostlist. Raises ValueError for an invalid one."""
        return list(filter_loader.get("expand_nodes").j2_function(text))

    def strangers(self, where: str, item: str, nodes: Iterable[str]) -> Iterator[Problem]:
        """Yields a problem for each node of a partition, group or switch that is not a compute node."""
        compute = self.hosts("slurm_compute")
        for node in (node for node in nodes if node not in compute):
            hint = self.close(node, compute)
            yield where, f"{item} has the node {node}, which is not in slurm_compute{hint}", ""

    @staticmethod
    def loops(parents: Mapping[str, str]) -> Iterator[str]:
        """Yields the names that are their own ancestors."""
        for name in parents:
            above, seen = parents[name], {name}
            while above in parents and above not in seen:
                seen.add(above)
                above = parents[above]
            if above == name:
                yield name

    @staticmethod
    def network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
        """Returns a network, or an address as a network; None if the text is neither."""
        try:
            return ipaddress.ip_network(text, strict=False)
        except ValueError:
            return None

    @staticmethod
    def close(word: str, known: Sequence[str]) -> str:
        """Returns a hint with the closest known word, or an empty string."""
        near = get_close_matches(word, known, n=1, cutoff=0.6)
        return f"; did you mean {near[0]}?" if near else ""

    @staticmethod
    def hint(word: str, known: Sequence[str]) -> str:
        """Returns a hint with the closest known word, ignoring case, or an empty string."""
        near = get_close_matches(word.lower(), [name.lower() for name in known], n=1, cutoff=0.7)
        return f"; did you mean {next(name for name in known if name.lower() == near[0])}?" if near else ""

    @staticmethod
    def one_of(names: Sequence[str]) -> str:
        """Returns the first few of the names."""
        return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")

    @cached_property
    def _described(self) -> tuple[Mapping[str, Any], ...]:
        described = filter_loader.get("node_hardware").j2_function
        return tuple(described(self.get(f"slurm_{name}", [])) for name in ("node_groups", "measured_nodes"))


def meaning_problems(values: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]]) -> list[Problem]:
    """Returns the problems in values that have the right format, from hosts' variables and groups.

    A rule that meets an invalid value, which is reported elsewhere, reports nothing.
    """
    site, found = Inventory(values, groups), []
    for rule in (rule for name in RULES for rule in filter_loader.get(name).j2_function()):
        try:
            found += list(rule(site))
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
    return found


def declared_by_node(
    values: Mapping[str, Mapping[str, Any]], groups: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns each compute node's declared hardware by variable; empty if a value is invalid."""
    site = Inventory(values, groups)
    try:
        found = {host: site.hardware(host) for host in site.hosts("slurm_compute")}
        for layer in (layer for layers in found.values() for layer in layers.values()):
            for gres in layer.get("gres", []):
                site.nodes(gres.get("file") or "")
        return found
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"declared_by_node": declared_by_node, "meaning_problems": meaning_problems}
