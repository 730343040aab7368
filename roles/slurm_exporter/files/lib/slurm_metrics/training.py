"""What training jobs write about themselves on shared storage: RUNS/USER/JOB. Every file there is as its user wants it.

So nothing is opened but regular files and directories that the job's user owns, each relative to the directory above
it and never through a link; how much is read of each, of each user and in all is bounded.
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

# A job that has ended still has its metrics for so long: its last values reach Prometheus.
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
    "tokens_per_second": ("tokens_per_second", "Tokens of all ranks a second."),
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
        "Part of a step spent agreeing with the other ranks on its loss and on stopping.",
    ),
    "communication_seconds": (
        "communication_seconds",
        "Part of a step in which collectives of sharding and context parallelism ran, also beside computation.",
    ),
    "evaluation_seconds": ("evaluation_seconds", "Validation since the record before, shared out among its steps."),
    "checkpoint_seconds": ("checkpoint_seconds", "Checkpoints since the record before, shared out among its steps."),
    "mfu": ("mfu_ratio", "Model FLOPS utilisation, 0 to 1; attention counts as the whole square."),
    "mfu_causal": (
        "mfu_causal_ratio",
        "Model FLOPS utilisation, 0 to 1; attention counts as what is computed, half the square.",
    ),
    "peak_memory_bytes": ("peak_memory_bytes", "Most that was allocated on a GPU since the record before."),
    "skipped_steps": ("skipped_steps", "Steps since the record before that changed no weights."),
    "roll_backs": ("roll_backs", "Times that the run went back to a checkpoint."),
}


def declare(metrics: Metrics) -> None:
    """Adds the gauges of training, empty."""
    labels = ("job_id", "user", "stage")
    metrics.declare("ictx_training_info", "1 for each training run.", *labels, "mlflow_run", "model")
    metrics.declare("ictx_training_running", "Whether SLURM runs the job now.", *labels)
    metrics.declare("ictx_training_last_record_timestamp_seconds", "When the job last wrote a record.", *labels)
    metrics.declare("ictx_training_record_interval_seconds", "Median time between records.", *labels)
    metrics.declare("ictx_training_last_checkpoint_timestamp_seconds", "When it last saved.", *labels)
    metrics.declare("ictx_training_checkpoint_interval_seconds", "Median time between checkpoints.", *labels)
    metrics.declare("ictx_training_steps", "Steps that the run is to have in the end.", *labels)
    for name, text in FIELDS.values():
        metrics.declare(f"ictx_training_{name}", text, *labels)


@dataclass(frozen=True)
class Run:
    """A job that may have a folder, as SLURM knows it; `uid` is who must own everything in it."""

    number: str
    user: str
    uid: int
    running: bool


class RefusedError(Exception):
    """Something in a user's folder that is not read."""


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
    # Opening a FIFO does not wait for its other end, and what was opened is examined, not what had the name before.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=parent)
    try:
        found = os.fstat(descriptor)
        if not kind(found.st_mode):
            raise RefusedError("not a regular file" if kind is stat.S_ISREG else "not a directory")
        if found.st_uid != owner:
            raise RefusedError(f"belongs to {found.st_uid} and not to {owner}")
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
    """Returns the median of the time between moments, 0 where there are fewer than two."""
    differences = [later - earlier for earlier, later in pairwise(sorted(filter(isfinite, times)))]
    return statistics.median(differences) if differences else 0.0


def small(name: str, owner: int, folder: int) -> bytes:
    """Returns the content of a small file, empty when it is not there. Raises RefusedError, OSError."""
    with suppress(FileNotFoundError), opened(name, owner, stat.S_ISREG, folder) as file:
        return os.pread(file, MOST_BYTES, 0)
    return b""


def last_lines(file: int) -> list[bytes]:
    """Returns the last whole lines of a file; half a line at the end, or where the part begins, does not count."""
    start = max(0, os.fstat(file).st_size - MOST_BYTES)
    lines = os.pread(file, MOST_BYTES, start).split(b"\n")[:-1]
    return lines[1 if start else 0 :][-MOST_LINES:]


def checkpoints(owner: int, folder: int) -> list[float]:
    """Returns when the checkpoints were saved; of very many only some count. Raises RefusedError, OSError."""
    saved = []
    with opened("checkpoints", owner, stat.S_ISDIR, folder) as inside, os.scandir(inside) as entries:
        for entry in islice(entries, MOST_ENTRIES):
            # Old ones are removed while we look.
            with suppress(FileNotFoundError):
                found = os.stat(entry.name, dir_fd=inside, follow_symlinks=False)
                if re.fullmatch(r"step-\d+", entry.name) and stat.S_ISDIR(found.st_mode) and found.st_uid == owner:
                    saved.append(found.st_mtime)
    return saved


class Reader:
    """Reads the folder of one run into the metrics. What cannot be read costs its own metrics only."""

    def __init__(self, metrics: Metrics, run: Run, folder: int) -> None:
        self.metrics, self.run, self.folder = metrics, run, folder
        self.who = (run.number, run.user, "")

    def row(self, what: str) -> Any:
        """Returns the context in which a part is read."""
        return self.metrics.row("training", f"{self.run.user}/{self.run.number}/{what}")

    def set(self, name: str, value: float | None, *labels: str) -> None:
        """Sets a metric of the run where there is a value."""
        if value is not None:
            self.metrics.set(f"ictx_training_{name}", value, *self.who, *labels)

    def read(self) -> None:
        """Reads everything, where the job writes metrics and runs or has just ended."""
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
        """Reads what the run is."""
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
            # A field that the last record lacks (validation is rarer) has the value of the last one that has it.
            values = [value for record in records if (value := real(record.get(field))) is not None]
            self.set(name, values[-1] if values else None)


def fairly(metrics: Metrics, runs: Iterable[Run]) -> list[Run]:
    """Returns the runs, one of each user after another: nobody's many folders use up the time of the others'."""
    of_user: defaultdict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: not run.running):
        of_user[run.user].append(run)
    for user, theirs in of_user.items():
        if more := len(theirs[FOLDERS_PER_USER:]):
            metrics.skip("limits", f"{more} folders of {user} are not read", more)
    turns = zip_longest(*(theirs[:FOLDERS_PER_USER] for theirs in of_user.values()))
    return [run for turn in turns for run in turn if run is not None]


def gather(metrics: Metrics, folder: Path, runs: Iterable[Run]) -> None:
    """Reads the folders of jobs below a folder that only root may write."""
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
