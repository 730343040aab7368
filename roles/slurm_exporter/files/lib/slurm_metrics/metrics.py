"""Gauges that are always valid in Prometheus' text format, for any input."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

# Name, value and label values of one sample.
Sample = tuple[str, float, tuple[str, ...]]
MOST_LETTERS = 128
# Log lines per run; the metric counts all rows.
MOST_LINES = 20


def printable(text: str) -> str:
    """Returns a label's value without control characters and surrogates, truncated to MOST_LETTERS."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:MOST_LETTERS])


class Metrics:
    """Gauges by name, and the number of skipped rows of each source."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._skipped: Counter[str] = Counter()
        self.declare("ictx_slurm_skipped_rows", "Rows that the last run skipped as invalid, by source.", "source")

    def declare(self, name: str, text: str, *labels: str) -> None:
        """Adds a gauge without a value."""
        self._gauges[name] = Gauge(name, text, labels, registry=self.registry)

    def set(self, name: str, value: float, *labels: str) -> None:
        """Sets the value for the label values. Raises OverflowError for an integer that no float can hold."""
        gauge = self._gauges[name]
        (gauge.labels(*map(printable, labels)) if labels else gauge).set(float(value))

    def take(self, samples: Iterable[Sample]) -> None:
        """Sets the samples of a row: all, or none if one is invalid."""
        for name, value, labels in [(name, float(value), labels) for name, value, labels in samples]:
            self.set(name, value, *labels)

    @contextmanager
    def row(self, source: str, what: str) -> Iterator[None]:
        """Reads one row: errors are counted and skip that row only. Files that no longer exist are ignored."""
        try:
            yield
        except FileNotFoundError:
            pass
        except Exception as error:  # Users control the content, so any error is possible.
            self.skip(source, f"{what}: {type(error).__name__}: {error}")

    def skip(self, source: str, why: str, rows: int = 1) -> None:
        """Counts skipped rows."""
        self._skipped[source] += rows
        if sum(self._skipped.values()) <= MOST_LINES:
            self.log(f"skipped a row of {source}: {why}")

    @staticmethod
    def log(text: str) -> None:
        """Logs a line to the journal."""
        print(f"ictx-slurm-metrics: {printable(text)}", file=sys.stderr)

    def write(self, path: str, sources: Iterable[str]) -> None:
        """Writes the file atomically, with the count of each source."""
        for source in sources:
            self.set("ictx_slurm_skipped_rows", self._skipped[source], source)
        write_to_textfile(path, self.registry)
