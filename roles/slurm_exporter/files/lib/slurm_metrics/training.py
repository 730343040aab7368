"""Metrics that training jobs write to shared storage: RUNS/USER/JOB. Users control the content of all files there.

So only regular files and directories that the job's user owns are opened, relative to their parent directory and never
through a link; the amount that is read per file, per user and in total is limited.
"""

from __future__ import annotations

import json
import os
import re
import stat
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice, pairwise, zip_longest
from math import isfinite
from pathlib import Path
from typing import Any

from .metrics import Metrics

# Metrics of an ended job are exported so long, so that Prometheus scrapes the last values.
AFTERWARDS = 600
# Limits: bytes and lines of a file, brackets and digits of JSON, entries of a directory, folders of a user, seconds.
MOST_BYTES = 65536
MOST_LINES = 50
MOST_BRACKETS = 64
MOST_DIGITS = 20
MOST_ENTRIES = 1000
FOLDERS_PER_USER = 200
MOST_SECONDS = 15.0
# Fields of a line of metrics.jsonl that become metrics: name of the field → name and help of the metric.
FIELDS = {
    "step": ("step", "Optimizer steps done."),
    "loss": ("loss", "Training loss of the last record, nats per token."),
    "validation_loss": ("validation_loss", "Validation loss, nats per token."),
    "rewards/margins": (
        "reward_margin",
        "DPO: reward of chosen answers less that of rejected ones, of the last record.",
    ),
    "rewards/accuracies": ("reward_accuracy_ratio", "DPO: share of pairs whose chosen answer has the higher reward."),
    "validation_rewards/margins": ("validation_reward_margin", "DPO: margin of held-out pairs."),
    "validation_rewards/accuracies": ("validation_reward_accuracy_ratio", "DPO: the share, of held-out pairs."),
    "gradient_norm": ("gradient_norm", "Norm of the whole gradient before clipping."),
    "learning_rate": ("learning_rate", "Learning rate."),
    "tokens_per_second": ("tokens_per_second", "Tokens per second of all ranks."),
    "step_seconds": ("step_seconds", "Time of one optimizer step."),
    "data_seconds": ("data_seconds", "Part of a step spent waiting for data."),
    "forward_seconds": ("forward_seconds", "Part of a step spent in the forward pass and the loss."),
    "backward_seconds": (
        "backward_seconds",
        "Part of a step spent in the backward pass, with sharded gradients' sums.",
    ),
    "optimizer_seconds": ("optimizer_seconds", "Part of a step spent clipping gradients and updating weights."),
    "ranks_seconds": (
        "ranks_seconds",
        "Part of a step spent exchanging loss and stop signals between ranks.",
    ),
    "communication_seconds": (
        "communication_seconds",
        "Part of a step in which collectives of sharding and context parallelism ran, including overlap.",
    ),
    "evaluation_seconds": ("evaluation_seconds", "Validation time since the previous record, divided by its steps."),
    "checkpoint_seconds": ("checkpoint_seconds", "Checkpoint time since the previous record, divided by its steps."),
    "mfu": ("mfu_ratio", "Model FLOPS utilisation, 0 to 1; attention counts as the full square."),
    "mfu_causal": (
        "mfu_causal_ratio",
        "Model FLOPS utilisation, 0 to 1; attention counts as half the square (causal).",
    ),
    "peak_memory_bytes": ("peak_memory_bytes", "Peak memory allocated on a GPU since the previous record."),
    "skipped_steps": ("skipped_steps", "Steps since the previous record that were skipped."),
    "roll_backs": ("roll_backs", "Number of rollbacks to a checkpoint."),
}


def declare(metrics: Metrics) -> None:
    """Adds the gauges of training, empty."""
    labels = ("job_id", "user", "stage")
    metrics.declare("ictx_training_info", "1 for each training run.", *labels, "mlflow_run", "model")
    metrics.declare("ictx_training_running", "Whether the job is running.", *labels)
    metrics.declare("ictx_training_last_record_timestamp_seconds", "Time of the job's last record.", *labels)
    metrics.declare("ictx_training_record_interval_seconds", "Median time between records.", *labels)
    metrics.declare("ictx_training_last_checkpoint_timestamp_seconds", "Time of the last checkpoint.", *labels)
    metrics.declare("ictx_training_checkpoint_interval_seconds", "Median time between checkpoints.", *labels)
    metrics.declare("ictx_training_steps", "Total steps of the run.", *labels)
    for name, text in FIELDS.values():
        metrics.declare(f"ictx_training_{name}", text, *labels)


@dataclass(frozen=True)
class Run:
    """A job of SLURM that may have a folder; `uid` must own everything in it."""

    number: str
    user: str
    uid: int
    running: bool


class RefusedError(Exception):
    """An entry of a user's folder that is not read for security."""


@contextmanager
def opened(name: str, owner: int, kind: Callable[[int], bool], parent: int) -> Iterator[int]:
    """Yields the descriptor of an entry of an open directory. Raises RefusedError, OSError.

    Args:
        name: name of the entry; no path.
        owner: user that the entry must belong to.
        kind: stat.S_ISREG or stat.S_ISDIR.
        parent: descriptor of the directory.
    """
    if "/" in name or name in ("", ".", ".."):
        raise RefusedError("not the name of an entry")
    # O_NONBLOCK for FIFOs; the opened file is checked, because the entry may have been replaced.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=parent)
    try:
        found = os.fstat(descriptor)
        if not kind(found.st_mode):
            raise RefusedError("not a regular file" if kind is stat.S_ISREG else "not a directory")
        if found.st_uid != owner:
            raise RefusedError(f"belongs to uid {found.st_uid}, not to {owner}")
        yield descriptor
    finally:
        os.close(descriptor)


def whole(digits: str) -> int:
    """Returns an integer of JSON. Raises ValueError for one with many digits."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def parsed(text: bytes) -> dict[str, Any]:
    """Returns an object of JSON. Raises ValueError."""
    if text.count(b"{") + text.count(b"[") > MOST_BRACKETS:
        raise ValueError("too many brackets")
    found = json.loads(text.decode(), parse_int=whole)
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found


def real(value: object) -> float | None:
    """Returns a number of JSON, None for anything else; `true` is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def gaps(times: Iterable[float]) -> float:
    """Returns the median interval between times, 0 for fewer than two."""
    differences = [later - earlier for earlier, later in pairwise(sorted(filter(isfinite, times)))]
    return statistics.median(differences) if differences else 0.0


def small(name: str, owner: int, folder: int) -> bytes:
    """Returns the content of a small file, empty if it does not exist. Raises RefusedError, OSError."""
    with suppress(FileNotFoundError), opened(name, owner, stat.S_ISREG, folder) as file:
        return os.pread(file, MOST_BYTES, 0)
    return b""


def last_lines(file: int) -> list[bytes]:
    """Returns the last complete lines of a file; truncated lines at either end are dropped."""
    start = max(0, os.fstat(file).st_size - MOST_BYTES)
    lines = os.pread(file, MOST_BYTES, start).split(b"\n")[:-1]
    return lines[1 if start else 0 :][-MOST_LINES:]


def checkpoints(owner: int, folder: int) -> list[float]:
    """Returns the times of at most MOST_ENTRIES checkpoints. Raises RefusedError, OSError."""
    saved = []
    with opened("checkpoints", owner, stat.S_ISDIR, folder) as inside, os.scandir(inside) as entries:
        for entry in islice(entries, MOST_ENTRIES):
            # Old ones may be removed meanwhile.
            with suppress(FileNotFoundError):
                found = os.stat(entry.name, dir_fd=inside, follow_symlinks=False)
                if re.fullmatch(r"step-\d+", entry.name) and stat.S_ISDIR(found.st_mode) and found.st_uid == owner:
                    saved.append(found.st_mtime)
    return saved


class Reader:
    """Reads the folder of one run into the metrics. Unreadable parts lose their own metrics only."""

    def __init__(self, metrics: Metrics, run: Run, folder: int) -> None:
        self.metrics, self.run, self.folder = metrics, run, folder
        self.who = (run.number, run.user, "")

    def row(self, what: str) -> Any:
        """Returns the context for reading a part."""
        return self.metrics.row("training", f"{self.run.user}/{self.run.number}/{what}")

    def set(self, name: str, value: float | None, *labels: str) -> None:
        """Sets a metric of the run if there is a value."""
        if value is not None:
            self.metrics.set(f"ictx_training_{name}", value, *self.who, *labels)

    def read(self) -> None:
        """Reads everything, if the job writes metrics and is running or has just ended."""
        with opened("metrics.jsonl", self.run.uid, stat.S_ISREG, self.folder) as file:
            written = os.fstat(file).st_mtime
            if not self.run.running and time.time() - written > AFTERWARDS:
                return
            lines = last_lines(file)
        self.read_about()
        self.set("running", float(self.run.running))
        with self.row("checkpoints"):
            if saved := checkpoints(self.run.uid, self.folder):
                self.set("last_checkpoint_timestamp_seconds", max(saved))
                self.set("checkpoint_interval_seconds", gaps(saved))
        self.read_records(lines, written)

    def read_about(self) -> None:
        """Reads the run's metadata."""
        about: dict[str, Any] = {}
        run_id = ""
        with self.row("about.json"):
            about = parsed(small("about.json", self.run.uid, self.folder) or b"{}")
        with self.row("mlflow_run_id"):
            run_id = small("mlflow_run_id", self.run.uid, self.folder).decode().strip()
            if not re.fullmatch(r"[\w-]{0,64}", run_id, re.ASCII):
                run_id = ""
                raise ValueError("not the ID of a run")
        model, stage = (value if isinstance(value := about.get(key), str) else "" for key in ("model", "stage"))
        self.who = (self.run.number, self.run.user, stage)
        self.set("info", 1, run_id, model)
        self.set("steps", real(about.get("steps")))

    def read_records(self, lines: Sequence[bytes], written: float) -> None:
        """Sets the fields of the last records."""
        records = []
        for line in lines:
            with self.row("metrics.jsonl"):
                records.append(parsed(line))
        if not records:
            return
        self.set("last_record_timestamp_seconds", written)
        times = (real(record.get("time")) for record in records)
        self.set("record_interval_seconds", gaps(moment for moment in times if moment is not None))
        for field, (name, _) in FIELDS.items():
            # If the last record lacks a field (validation is rarer), the latest value is used.
            values = [value for record in records if (value := real(record.get(field))) is not None]
            self.set(name, values[-1] if values else None)


def fairly(metrics: Metrics, runs: Iterable[Run]) -> list[Run]:
    """Returns the runs of users in turn, so that one user's folders cannot use up the time."""
    of_user: defaultdict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: not run.running):
        of_user[run.user].append(run)
    for user, theirs in of_user.items():
        if more := len(theirs[FOLDERS_PER_USER:]):
            metrics.skip("limits", f"{more} folders of {user} are not read", more)
    turns = zip_longest(*(theirs[:FOLDERS_PER_USER] for theirs in of_user.values()))
    return [run for turn in turns for run in turn if run is not None]


def gather(metrics: Metrics, folder: Path, runs: Iterable[Run]) -> None:
    """Reads the folders of jobs in a folder that only root can write to."""
    end = time.monotonic() + MOST_SECONDS
    root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        turns = fairly(metrics, runs)
        for number, run in enumerate(turns):
            if time.monotonic() > end:
                metrics.skip("limits", "no time left to read their folders", len(turns) - number)
                break
            with (
                metrics.row("training", f"{run.user}/{run.number}"),
                opened(run.user, run.uid, stat.S_ISDIR, root) as user,
                opened(run.number, run.uid, stat.S_ISDIR, user) as mine,
            ):
                Reader(metrics, run, mine).read()
    finally:
        os.close(root)
