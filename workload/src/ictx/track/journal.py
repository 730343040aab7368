"""Logging of a run: lines on the console, records in its folder, and from there to tracking servers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ictx.track.config import DEFAULTS, TrackConfig
from ictx.track.lineage import UNKNOWN, Lineage
from ictx.track.mlflow import Tracker
from ictx.track.outbox import Outbox
from ictx.track.records import MetricsFile, finite
from ictx.track.report import write_report
from ictx.track.wandb import Description, WandbSink, mode


class Journal:
    """Logs on the first rank; on other ranks all methods do nothing."""

    def __init__(
        self,
        first: bool,
        directory: Path,
        experiment: str,
        settings: Mapping[str, Any],
        resumed_from: int,
        patience: float,
        lineage: Lineage = UNKNOWN,
        track: TrackConfig = DEFAULTS,
    ) -> None:
        """Starts, or after a restart continues, the records in `directory`."""
        self.tracker = Tracker(directory, experiment, settings, patience, lineage, track) if first else None
        self.metrics = MetricsFile(directory / "metrics.jsonl", resumed_from) if first else None
        self.directory = directory
        self.outboxes: list[Outbox] = []
        self.wandb: WandbSink | None = None
        self._linked = ""
        if not (self.tracker and self.metrics):
            return
        if mode(track) != "disabled":
            links = {"mlflow_run_id": self.tracker.run_id, "mlflow_experiment": self.tracker.experiment}
            links |= {"mlflow_url": self.tracker.url} if self.tracker.url else {}
            about = Description(self.tracker.run_name, experiment, settings, links, self.tracker.tags)
            self.wandb = WandbSink(directory, track, about, patience)
            # First: the links to it are tags of the MLflow run, which ends last.
            self.outboxes.append(Outbox(self.wandb, self.metrics, None, resumed_from))
        self.outboxes.append(Outbox(self.tracker, self.metrics, directory / "mlflow_sent_step", resumed_from))

    def say(self, text: str) -> None:
        """Prints a line."""
        if self.metrics:
            print(text, flush=True)

    def record(self, record: Mapping[str, float]) -> None:
        """Writes a record with its `step`; it is sent to tracking servers at the next `flush`."""
        if self.metrics:
            timed = finite({**record, "time": round(time.time(), 3)})
            self.metrics.append(timed)
            for outbox in self.outboxes:
                outbox.waiting.append(timed)

    def rewind(self, step: int) -> None:
        """Removes the records of later steps, which will be computed again."""
        if self.metrics:
            self.metrics.rewind(step)
            for outbox in self.outboxes:
                outbox.rewind(step)

    def flush(self, step: int) -> None:
        """Sends pending records up to a checkpoint's step, so that a restart from there repeats no step."""
        for outbox in self.outboxes:
            outbox.try_to_send(step)
        self._link()

    def finish(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        for outbox in self.outboxes:
            outbox.close(status)
            self._link()
        if self.tracker and status == "FINISHED":
            self._report(self.tracker)

    def _report(self, tracker: Tracker) -> None:
        """Draws and logs the run's report; a failure does not fail the run."""
        try:
            for path in write_report(self.directory):
                tracker.client.log_artifact(tracker.run_id, str(path), "report")
        except (OSError, ValueError, tracker.failure) as error:
            print(f"no report of the run in MLflow: {tracker.reason(error)}", flush=True)

    def _link(self) -> None:
        """Adds the W&B run's URL to the MLflow run; retried at the next start if the server does not respond."""
        if not (self.tracker and self.wandb) or self._linked == (found := self.wandb.url or self.wandb.path):
            return
        with suppress(self.tracker.failure):
            self.tracker.tag(self.wandb.tags)
            self._linked = found
