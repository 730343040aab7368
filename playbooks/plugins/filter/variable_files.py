"""Ansible filter: variable files beside an inventory that match no group or host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

READ = (".yml", ".yaml", ".json")


def _named(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields the files and folders that look like variable files, each with the name of its group or host."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(("README", ".")) or path.name.endswith("~"):
            continue
        if path.is_dir() or path.suffix in (*READ, ""):
            yield path.name, path.stem if path.suffix in READ and path.is_file() else path.name


def stray_variable_files(folders: Iterable[str], groups: Iterable[str], hosts: Iterable[str]) -> list[tuple[str, str]]:
    """Returns the files (such as group_vars/FILE) that match no group or host, with remedies.

    Args:
        folders: the inventory's folders (`inventory_dir` of the hosts).
        groups: names of all groups.
        hosts: names of all hosts.
    """
    found = []
    for folder in sorted(set(folders)):
        for kind, known in (
            ("group", sorted({*map(str, groups), "all", "ungrouped"})),
            ("host", sorted(map(str, hosts))),
        ):
            for file, name in _named(Path(folder) / f"{kind}_vars"):
                if name not in known:
                    near = get_close_matches(name, known, n=1, cutoff=0.75)
                    remedy = f"did you mean {near[0]}?" if near else "rename it, or remove it"
                    found.append(
                        (f"{kind}_vars/{file}", f"there is no {kind} {name}, so that nothing reads it: {remedy}")
                    )
    return found


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"stray_variable_files": stray_variable_files}
