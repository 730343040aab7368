"""Counts the skipped files and rows of a corpus by reason, for the report."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from ictx.errors import printable

# Maximum names per line; further ones are only counted.
NAMED = 5


class Unreadable(Exception):
    """A file without readable text; the message is the reason."""


class Skipped:
    """Counts skipped items in constant memory."""

    def __init__(self) -> None:
        self.counts = Counter[tuple[str, str]]()
        self._names = defaultdict[tuple[str, str], list[str]](list)
        self._others = Counter[tuple[str, str]]()

    def add(self, name: str | Path, unit: str, why: str, count: int = 1) -> None:
        """Counts `count` units (`file`, `row`) of a file or folder, skipped for the reason `why`."""
        if not count:
            return
        key = unit, why
        self.counts[key] += count
        if len(self._names[key]) < NAMED:
            self._names[key].append(printable(str(name)))
        else:
            self._others[key] += 1

    def lines(self) -> Iterator[str]:
        """Yields one line per reason."""
        for key, count in self.counts.items():
            (unit, why), others = key, f" and {self._others[key]:,} more" if self._others[key] else ""
            yield f"skipped {count:,} {unit}{'s'[: count > 1]} ({why}): {', '.join(self._names[key])}{others}"
