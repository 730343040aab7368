"""Ansible filter: files of variables beside an inventory that Ansible reads for no group and no host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

READ = (".yml", ".yaml", ".json")


def _named(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields the files and folders that look like one of variables, each with the name that it is for."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(("README", ".")) or path.name.endswith("~"):
            continue
        if path.is_dir() or path.suffix in (*READ, ""):
            yield path.name, path.stem if path.suffix in READ and path.is_file() else path.name


def stray_variable_files(folders: Iterable[str], groups: Iterable[str], hosts: Iterable[str]) -> list[tuple[str, str]]:
    """Returns the files (as in group_vars/FILE) whose name is that of no group or host, and what to do.

    Args:
        folders: where the inventory's files are (`inventory_dir` of the hosts).
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
                    remedy = f"is it {near[0]}, misspelt?" if near else "rename it, or remove it"
                    found.append(
                        (f"{kind}_vars/{file}", f"there is no {kind} {name}, so that nothing reads it: {remedy}")
                    )
    return found


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"stray_variable_files": stray_variable_files}
