"""Queue of records for a tracking server: nothing is lost while the server is down, also across restarts of the job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ictx.folder import write_whole
from ictx.track.records import MetricsFile


class Sink(Protocol):
    """Interface of a tracking server."""

    name: str
    """Name of the server, for messages."""

    @property
    def failure(self) -> type[Exception]:
        """Exception that its methods raise if the server does not respond."""

    def log(self, records: list[Mapping[str, float]]) -> None:
        """Sends records, each with `step` and `time` (Unix seconds)."""

    def finish(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""

    def patiently(self, call: Callable[[], Any]) -> Any:
        """Returns the call's result; retries for some time while the server does not respond."""

    def reason(self, error: Exception) -> str:
        """Returns an error's cause in one line."""


class Outbox:
    """Sends the records of metrics.jsonl after the step in `note` to a sink; without a note, all of them."""

    def __init__(self, sink: Sink, metrics: MetricsFile, note: Path | None, resumed_from: int) -> None:
        """Includes records that an earlier start of the run could not send."""
        self.sink, self.note = sink, note
        self.sent = min(_step(note), resumed_from) if note else 0
        self.waiting: list[Mapping[str, float]] = [*metrics.after(self.sent)]
        self._away = False

    def rewind(self, step: int) -> None:
        """Drops the records of later steps."""
        self.waiting = [record for record in self.waiting if record["step"] <= step]

    def send(self, until: float = float("inf")) -> None:
        """Sends pending records of steps up to `until`. If it raises the sink's `failure`, records stay pending."""
        due = [record for record in self.waiting if record["step"] <= until]
        if not due:
            return
        self.sink.log(due)
        self.sent = int(due[-1]["step"])
        self.waiting = self.waiting[len(due) :]
        try:
            if self.note:
                write_whole(self.note, f"{self.sent}\n")
        except OSError as error:
            # The next start sends them again, which has no effect.
            print(f"cannot write {self.note}: {error.strerror}", flush=True)
        if self._away:
            print(f"{self.sink.name} answers again: {len(due)} records sent", flush=True)
        self._away = False

    def try_to_send(self, until: float = float("inf")) -> None:
        """Sends pending records, or prints why it failed."""
        try:
            self.send(until)
        except self.sink.failure as error:
            count = len(self.waiting)
            print(f"{self.sink.name} does not answer ({self.sink.reason(error)}): {count} records wait", flush=True)
            self._away = True

    def close(self, status: str) -> None:
        """Sends pending records and ends the run as FINISHED, FAILED or KILLED.

        Only a successful run waits for a server that does not respond. A killed run sends pending records when it
        continues, and an error here must not hide the cause of a failed run.
        """
        if status == "FINISHED":
            self.sink.patiently(self.send)
            self.sink.patiently(lambda: self.sink.finish(status))
            return
        self.try_to_send()
        try:
            self.sink.finish(status)
        except self.sink.failure as error:
            print(f"{self.sink.name} did not record that the run is {status} ({self.sink.reason(error)})", flush=True)


def _step(note: Path) -> int:
    """Returns the step in a note; 0 if it is missing or invalid, so that everything is sent again."""
    try:
        return max(int(note.read_text()), 0)
    except (OSError, ValueError):
        return 0
