"""metrics.jsonl: the records of a run, one per line."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from ictx.folder import write_whole
from ictx.manifest import open_regular


def read_records(path: Path) -> list[dict[str, float]]:
    """Returns the records of a run; skips lines that were truncated by a crash or a full disk."""
    if not os.path.lexists(path):
        return []
    with open_regular(path) as file:
        return [record for line in file if (record := _record(line))]


class MetricsFile:
    """metrics.jsonl: one record per line, each step once, also after restarts."""

    def __init__(self, path: Path, resumed_from: int) -> None:
        """Removes the records that will be computed again: those after step `resumed_from`; all of them if it is 0."""
        self.path = path
        self._late: list[Mapping[str, float]] = []
        # A validation before the first step is recorded as step 0.
        self.rewind(resumed_from or -1)

    def rewind(self, step: int) -> None:
        """Removes the records of later steps."""
        self._late = [record for record in self._late if record["step"] <= step]
        write_whole(self.path, "".join(_line(record) for record in read_records(self.path) if record["step"] <= step))

    def append(self, record: Mapping[str, float]) -> None:
        """Appends a record's finite numbers. On a full disk it is kept for the next call, and training continues."""
        waited = bool(self._late)
        self._late.append(record)
        try:
            _append(self.path, "".join(map(_line, self._late)).encode())
        except OSError as error:
            if not waited:
                print(f"cannot write {self.path}: {error.strerror}: records wait", flush=True)
        else:
            self._late = []

    def after(self, step: int) -> list[dict[str, float]]:
        """Returns the records of later steps."""
        return [record for record in read_records(self.path) if record["step"] > step]


def _append(path: Path, content: bytes) -> None:
    """Appends all of the content to a file, or nothing. Raises OSError."""
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            written = file.write(content)
        except OSError:
            file.truncate(end)
            raise
        if written != len(content):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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
    """Returns a record without non-finite numbers, which JSON does not support."""
    return {name: value for name, value in record.items() if abs(value) <= sys.float_info.max}
