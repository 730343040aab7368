"""What a run reports: lines on the console, records in its folder, and from there to tracking servers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ictx.track.lineage import UNKNOWN, Lineage
from ictx.track.mlflow import Tracker
from ictx.track.outbox import Outbox
from ictx.track.records import MetricsFile, finite


class Journal:
    """The first rank's voice; on other ranks every method does nothing."""

    def __init__(
        self,
        first: bool,
        directory: Path,
        experiment: str,
        settings: Mapping[str, Any],
        resumed_from: int,
        patience: float,
        lineage: Lineage = UNKNOWN,
    ) -> None:
        """Begins, or after a restart goes on with, the records in `directory`."""
        self.tracker = Tracker(directory, experiment, settings, patience, lineage) if first else None
        self.metrics = MetricsFile(directory / "metrics.jsonl", resumed_from) if first else None
        self.outboxes: list[Outbox] = []
        if self.tracker and self.metrics:
            self.outboxes = [Outbox(self.tracker, self.metrics, directory / "mlflow_sent_step", resumed_from)]

    def say(self, text: str) -> None:
        """Prints a line."""
        if self.metrics:
            print(text, flush=True)

    def record(self, record: Mapping[str, float]) -> None:
        """Writes a record with its `step`; it reaches tracking servers at the next `flush`."""
        if self.metrics:
            timed = finite({**record, "time": round(time.time(), 3)})
            self.metrics.append(timed)
            for outbox in self.outboxes:
                outbox.waiting.append(timed)

    def rewind(self, step: int) -> None:
        """Forgets the records of later steps: they are going to be computed again."""
        if self.metrics:
            self.metrics.rewind(step)
            for outbox in self.outboxes:
                outbox.rewind(step)

    def flush(self, step: int) -> None:
        """Sends what waits up to the step of a checkpoint, so that a restart from there repeats no step."""
        for outbox in self.outboxes:
            outbox.try_to_send(step)

    def finish(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        for outbox in self.outboxes:
            outbox.close(status)
