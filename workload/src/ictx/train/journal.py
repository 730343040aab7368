"""What a run tells: lines on the console, metrics.jsonl in its folder, and its MLflow run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ictx.train.tracking import Tracker


class MetricsFile:
    """metrics.jsonl: one record a line, each step once however often the run restarts."""

    def __init__(self, path: Path, resumed_from: int) -> None:
        """Keeps the records up to step `resumed_from`: what lies behind it is going to be computed again."""
        self.path = path
        kept = [line for line in self._lines() if json.loads(line)["step"] <= resumed_from]
        draft = path.with_suffix(".part")
        draft.write_text("".join(f"{line}\n" for line in kept))
        draft.replace(path)

    def _lines(self) -> list[str]:
        """Returns the whole lines; a crash may have left half of one at the end."""
        if not self.path.exists():
            return []
        *whole, _ = self.path.read_text().split("\n")
        return whole

    def append(self, record: Mapping[str, float]) -> None:
        """Adds a record."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class Journal:
    """The first rank's voice; on other ranks every method does nothing."""

    def __init__(
        self, first: bool, directory: Path, experiment: str, settings: Mapping[str, Any], resumed_from: int
    ) -> None:
        """Begins, or after a restart goes on with, the records in `directory`."""
        self.tracker = Tracker(directory, experiment, settings) if first else None
        self.metrics = MetricsFile(directory / "metrics.jsonl", resumed_from) if first else None
        self._pending: list[Mapping[str, float]] = []

    def say(self, text: str) -> None:
        """Prints a line."""
        if self.tracker:
            print(text, flush=True)

    def record(self, record: Mapping[str, float]) -> None:
        """Writes a record with its `step`; it reaches MLflow at the next `flush`."""
        if self.metrics:
            self.metrics.append(record)
            self._pending.append(record)

    def flush(self) -> None:
        """Sends what is pending to MLflow: together with each checkpoint, so that a restart repeats no step there."""
        if self.tracker and self._pending:
            self.tracker.log(self._pending)
            self._pending = []

    def finish(self, status: str) -> None:
        """Ends the MLflow run as FINISHED, FAILED or KILLED."""
        if self.tracker:
            self.flush()
            self.tracker.finish(status)
