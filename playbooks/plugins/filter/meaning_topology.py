"""Ansible filter: rules of preflight (meaning.py) about SLURM's topology."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Problem = tuple[str, str, str]


def topology(site: Any) -> Iterator[Problem]:
    """Each node is at one switch (or in one block), and switches are listed after those below them."""
    compute, seen = site.hosts("slurm_compute"), {}
    given = site.get("slurm_topology", [])
    names: list[str] = []
    parents: dict[str, str] = {}
    for item in given:
        name, below = item["name"], item.get("switches", [])
        if bool(item.get("nodes")) == bool(below):
            yield "slurm_topology", f"{name} needs either nodes or switches", ""
        if below and site.get("slurm_topology_type") == "block":
            yield "slurm_topology", f"{name} has switches, which slurm_topology_type: block does not support", ""
        for switch in below:
            if switch in parents:
                text = (
                    f"{switch} is below {parents[switch]} and below {name}: a tree has one parent, remove it from one"
                )
                yield "slurm_topology", text, ""
            parents.setdefault(switch, name)
            if switch not in names:
                yield "slurm_topology", f"{name} is above {switch}, which must be listed before it", ""
        names.append(name)
        try:
            listed = site.listed(item) if item.get("nodes") else []
        except ValueError as error:
            yield "slurm_topology", f"{name}: {error}", ""
            continue
        yield from site.strangers("slurm_topology", name, listed)
        for node in listed:
            if node in compute and node in seen:
                yield "slurm_topology", f"{node} is at {seen[node]} and at {name}: remove it from one", ""
            seen[node] = name
    for name in site.loops(parents):
        yield "slurm_topology", f"{name} is below itself: remove it from switches of {parents[name]}", ""
    left = [node for node in compute if node not in seen]
    if given and left:
        text = f"{site.one_of(left)} is at no switch: jobs could not use it with another node; add it to one"
        yield "slurm_topology", text, ""


def rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return (topology,)


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"meaning_topology": rules}
