"""Samples of an evaluation: planned before it starts, saved as they finish, never computed twice."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ictx.data.progress import Progress
from ictx.errors import UserError
from ictx.folder import write_whole

SETTINGS_FILE, SAMPLES_FILE = "settings.json", "samples.jsonl"
T = TypeVar("T")


@dataclass(frozen=True)
class Planned(Generic[T]):
    """A sample to be computed."""

    key: str
    """Key in SAMPLES_FILE."""
    tokens: int
    """Tokens that a model reads and writes for it."""
    content: T
    """Input of the computation."""


class Samples:
    """Finished samples in a file, one JSON line with a `key` each."""

    def __init__(self, file: Path) -> None:
        """Reads the samples of an earlier start; removes an incomplete last line, left by a killed process."""
        self.file = file
        self.done: dict[str, dict[str, Any]] = {}
        if not file.exists():
            return
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with file.open("r+b") as open_file:
                open_file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self.done[record.pop("key")] = record
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{file} line {number} is not a finished sample: remove the file") from error

    def add(self, key: str, record: Mapping[str, Any]) -> None:
        """Saves a finished sample."""
        with self.file.open("a") as file:
            file.write(json.dumps({"key": key, **record}) + "\n")
        self.done[key] = dict(record)


@contextmanager
def open_samples(folder: Path, settings: Mapping[str, Any]) -> Iterator[Samples]:
    """Yields the samples of an evaluation with these settings; the folder is locked meanwhile.

    Raises UserError if the folder has samples of other settings, or is locked by another process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / SETTINGS_FILE
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another evaluation writes to {folder}: wait for it, or set another --out") from None
        # As it is read back: JSON has lists instead of tuples.
        wanted = json.loads(json.dumps(settings))
        if note.exists():
            try:
                found = json.loads(note.read_text())
            except ValueError:
                found = None
            if found != wanted:
                raise UserError(
                    f"{folder} has samples of other settings{_difference(found, wanted)}: set another --out"
                )
        else:
            write_whole(note, json.dumps(wanted, indent=1) + "\n")
        yield Samples(folder / SAMPLES_FILE)


def _difference(found: Any, wanted: Mapping[str, Any]) -> str:
    """Returns the first setting that differs, for a message."""
    if not isinstance(found, dict):
        return ""
    name = next((key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)), "")
    return f" ({name} was {found.get(name)!r}, is {wanted.get(name)!r})"


def finish(
    what: str,
    planned: Sequence[Planned[T]],
    samples: Samples,
    work: Callable[[Sequence[T]], Sequence[Mapping[str, Any]]],
    batch_size: int = 1,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Computes the missing samples; returns all, in the order of `planned`.

    Prints the amount of work first, and after the first batch the estimated time for the rest. Raises UserError.

    Args:
        work: returns a record for each sample of a batch.
    """
    if batch_size < 1:
        raise UserError(f"batch-size is {batch_size}: expected 1 or more")
    waiting = [each for each in planned if each.key not in samples.done]
    total = sum(each.tokens for each in waiting)
    there = f", {len(planned) - len(waiting)} of them finished before" if len(waiting) < len(planned) else ""
    say(f"{what}: {len(planned)} samples{there}; {total:,} tokens to read and write, batch size {batch_size}")
    with Progress(what, total, "tokens") as progress:
        for first in range(0, len(waiting), batch_size):
            batch, began = waiting[first : first + batch_size], time.monotonic()
            records = work([each.content for each in batch])
            for each, record in zip(batch, records, strict=True):
                samples.add(each.key, record)
            tokens = sum(each.tokens for each in batch)
            progress.add(tokens)
            if not first and len(waiting) > batch_size:
                seconds = max(time.monotonic() - began, 1e-9)
                rest = (total - tokens) * seconds / tokens
                say(
                    f"{what}: the first batch took {seconds:,.1f} s for {tokens:,} tokens; the rest about {rest:,.0f} s"
                )
    return [samples.done[each.key] for each in planned]


def require_samples(count: int) -> None:
    """Raises UserError unless `count` is 1 or more."""
    if count < 1:
        raise UserError(f"samples is {count}: expected 1 or more")
