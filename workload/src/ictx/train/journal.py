"""What a run tells: lines on the console, metrics.jsonl in its folder, and its MLflow run."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException

from ictx.folder import write_whole
from ictx.manifest import open_regular
from ictx.registry import reason
from ictx.train.tracking import Tracker, patiently


class MetricsFile:
    """metrics.jsonl: one record a line, each step once however often the run restarts."""

    def __init__(self, path: Path, resumed_from: int) -> None:
        """Keeps the records up to step `resumed_from`: what lies behind it is going to be computed again."""
        self.path = path
        kept = [record for record in self._records() if record["step"] <= resumed_from]
        write_whole(path, "".join(map(_line, kept)))

    def _records(self) -> list[dict[str, float]]:
        """Returns the records; a crash, or a full disk, may have left lines that are none."""
        if not os.path.lexists(self.path):
            return []
        with open_regular(self.path) as file:
            return [record for line in file if (record := _record(line))]

    def append(self, record: Mapping[str, float]) -> None:
        """Adds a record of finite numbers."""
        with self.path.open("a") as file:
            file.write(_line(record))

    def after(self, step: int) -> list[dict[str, float]]:
        """Returns the records of later steps."""
        return [record for record in self._records() if record["step"] > step]


def _line(record: Mapping[str, float]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _record(line: bytes) -> dict[str, float] | None:
    """Returns the record in a line, or None."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not line.endswith(b"\n"):
        return None
    if type(step := record.get("step")) is not int or not 0 <= step < 1 << 63:
        return None
    numbers = {name: value for name, value in record.items() if type(value) in (int, float)}
    return finite({"time": 0.0} | numbers)


def finite(record: Mapping[str, float]) -> dict[str, float]:
    """Returns a record without the numbers that are not finite: JSON has none."""
    return {name: value for name, value in record.items() if abs(value) <= sys.float_info.max}


class Outbox:
    """What the tracking server has not got yet: the records of metrics.jsonl behind the step in `note`.

    A server that is away loses nothing: records wait in the file, also over restarts of the job.
    """

    def __init__(self, tracker: Tracker, metrics: MetricsFile, note: Path, resumed_from: int) -> None:
        """Takes up what an earlier start of the run could not send."""
        self.tracker, self.note = tracker, note
        self.sent = min(_step(note), resumed_from)
        self.waiting: list[Mapping[str, float]] = [*metrics.after(self.sent)]
        self._away = False

    def send(self) -> None:
        """Sends what waits. Raises MlflowException; nothing is lost then."""
        if self.waiting:
            self.tracker.log(self.waiting)
            self.sent = int(self.waiting[-1]["step"])
            write_whole(self.note, f"{self.sent}\n")
        if self._away:
            print(f"MLflow answers again: {len(self.waiting)} records sent", flush=True)
        self._away, self.waiting = False, []

    def try_to_send(self) -> None:
        """Sends what waits, or says why it goes on waiting."""
        try:
            self.send()
        except MlflowException as error:
            print(f"MLflow does not answer ({reason(error)}): {len(self.waiting)} records wait", flush=True)
            self._away = True


def _step(note: Path) -> int:
    """Returns the step in a note; 0, from which everything is sent again, when there is none that can be read."""
    try:
        return max(int(note.read_text()), 0)
    except (OSError, ValueError):
        return 0


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
    ) -> None:
        """Begins, or after a restart goes on with, the records in `directory`."""
        self.tracker = Tracker(directory, experiment, settings, patience) if first else None
        self.metrics = MetricsFile(directory / "metrics.jsonl", resumed_from) if first else None
        self.outbox: Outbox | None = None
        if self.tracker and self.metrics:
            self.outbox = Outbox(self.tracker, self.metrics, directory / "mlflow_sent_step", resumed_from)

    def say(self, text: str) -> None:
        """Prints a line."""
        if self.tracker:
            print(text, flush=True)

    def record(self, record: Mapping[str, float]) -> None:
        """Writes a record with its `step`; it reaches MLflow at the next `flush`."""
        if self.metrics and self.outbox:
            timed = finite({**record, "time": round(time.time(), 3)})
            self.metrics.append(timed)
            self.outbox.waiting.append(timed)

    def flush(self) -> None:
        """Sends what waits to MLflow: together with each checkpoint, so that a restart repeats no step there."""
        if self.outbox and self.outbox.waiting:
            self.outbox.try_to_send()

    def finish(self, status: str) -> None:
        """Ends the MLflow run as FINISHED, FAILED or KILLED.

        Only a run that succeeded waits for a server that is away: one that was killed goes on later and then sends what
        waits, and the reason of a failure must not be hidden by another.
        """
        if not self.tracker or not self.outbox:
            return
        if status == "FINISHED":
            patiently(self.outbox.send, self.tracker.patience)
            patiently(lambda: self._end(status), self.tracker.patience)
            return
        self.outbox.try_to_send()
        try:
            self._end(status)
        except MlflowException as error:
            print(f"MLflow did not learn that the run is {status} ({reason(error)})", flush=True)

    def _end(self, status: str) -> None:
        if self.tracker:
            self.tracker.finish(status)
