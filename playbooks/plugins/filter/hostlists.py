"""Ansible filters: lists of nodes as SLURM writes them (`gpu[1-4,7],cpu1`), and back."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

MOST_NODES = 100_000
LONGEST_NUMBER = 9  # digits; SLURM treats longer numbers as a part of the name


def expand_nodes(text: str) -> list[str]:
    """Returns the names in a hostlist, up to MOST_NODES. Raises ValueError if it is invalid."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        pieces: list[list[str]] = []
        for fixed, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", part):
            pieces.append([fixed] if fixed else [number for item in ranges.split(",") for number in _range(item)])
        names += ["".join(name) for name in itertools.islice(itertools.product(*pieces), MOST_NODES)]
    if re.sub(r"[^,\[\]]|\[[^\[\]]*\]", "", text).strip(",") or not names:
        raise ValueError(f"{text} is not a list of nodes")
    return names


def _range(item: str) -> list[str]:
    ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", item)
    if not ends or int(ends[2] or ends[1]) < int(ends[1]):
        raise ValueError(f"[{item}] is not a range of numbers")
    return [str(number).zfill(len(ends[1])) for number in range(int(ends[1]), int(ends[2] or ends[1]) + 1)]


def compress_nodes(names: Iterable[str]) -> str:
    """Returns the shortest hostlist of names (or addresses) that end in numbers, in the order in which they are given.

    SLURM pairs the names of NodeName with the addresses of NodeAddr one by one, so the order is kept.
    """
    runs: list[tuple[str, list[tuple[str, str]]]] = []
    for name in names:
        prefix, number = re.fullmatch(rf"(.*?)(\d{{0,{LONGEST_NUMBER}}})", name, re.DOTALL).groups()  # type: ignore[union-attr]
        if not runs or runs[-1][0] != prefix or not number or not runs[-1][1][0][0]:
            runs.append((prefix, [(number, number)]))
            continue
        first, last = runs[-1][1][-1]
        if number == str(int(last) + 1).zfill(len(first)):
            runs[-1][1][-1] = first, number
        else:
            runs[-1][1].append((number, number))
    return ",".join(prefix + _numbers(ranges) for prefix, ranges in runs)


def _numbers(ranges: list[tuple[str, str]]) -> str:
    text = ",".join(first if first == last else f"{first}-{last}" for first, last in ranges)
    return text if re.fullmatch(r"\d*", text) else f"[{text}]"


def sort_nodes(names: Iterable[str]) -> list[str]:
    """Returns the names in the order of their numbers: n2 before n10."""
    return sorted(
        names, key=lambda name: [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]
    )


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"compress_nodes": compress_nodes, "expand_nodes": expand_nodes, "sort_nodes": sort_nodes}
