"""The ranks of `ictx bench train`: processes on this machine, one per GPU."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.multiprocessing.spawn import spawn

from ictx.bench.links import bandwidths
from ictx.bench.one_rank import simulated
from ictx.bench.train import guarded
from ictx.bench.train_case import Case, Row
from ictx.bench.train_check import Check, compare
from ictx.errors import UserError
from ictx.parallel import Layout
from ictx.train.ranks import joined

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """Work of one set of ranks."""

    cases: list[Case]
    layout: Layout = field(default_factory=Layout)
    cap: float | None = None
    """Maximum bytes of GPU memory per rank."""
    reference: Layout | None = None
    """Layout to compare gradients with, instead of measuring."""
    simulate: bool = False
    """Whether one process measures the first rank, with copies instead of communication."""


def _rank(rank: int, count: int, port: int, job: Job, out: str) -> None:
    """Runs one rank."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with simulated(job.layout, count) if job.simulate else joined(job.layout) as ranks:
        if job.cap is not None and ranks.device.type == "cuda":
            whole = torch.cuda.get_device_properties(ranks.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(job.cap / whole, 1.0), ranks.device)
        linked = ranks.device.type == "cuda" and count > 1 and not job.reference and not job.simulate
        links = bandwidths(ranks) if linked else {}
        for case in job.cases:
            if job.reference:
                found: list[Any] = [*compare(case, ranks, job.reference)]
            else:
                row = guarded(case, ranks)
                row.links, row.cap, row.simulated = links, job.cap, job.simulate
                if job.simulate:
                    # The loss is that of copied data, and the others' peaks are copies of this rank's.
                    row.loss, row.peaks = None, row.peaks[:1]
                found = [row]
            torch._dynamo.reset()
            if ranks.first:
                with Path(out).open("a") as file:
                    file.writelines(json.dumps(asdict(one)) + "\n" for one in found)


def start(job: Job, count: int, collect: Callable[[dict[str, Any]], T]) -> list[T]:
    """Starts `count` ranks on this machine; returns the first rank's results. Raises UserError for too few GPUs."""
    if torch.cuda.is_available() and torch.cuda.device_count() < count and not job.simulate:
        raise UserError(
            f"--ranks is {count}: this machine has {torch.cuda.device_count()} GPUs; --simulate measures one rank alone"
        )
    job.layout.of(count)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows"
        spawn(_rank, (count, port, job, str(out)), nprocs=1 if job.simulate else count)  # type: ignore[no-untyped-call]
        return [collect(json.loads(line)) for line in out.read_text().splitlines()]


def check(job: Job, count: int) -> list[Check]:
    """Compares the gradients of a job's layout with its reference's. Raises UserError as `start` does."""
    return start(job, count, lambda content: Check(**content))


def run(job: Job, count: int) -> list[Row]:
    """Measures the cases of a job on `count` ranks. Raises UserError as `start` does."""
    return start(job, count, lambda content: Row(**content))
