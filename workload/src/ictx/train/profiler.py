"""Traces of training steps for chrome://tracing and Perfetto."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import profile, schedule

SKIPPED, WARM_UP = 2, 1
"""Steps before the traced ones; in the first step kernels are compiled and memory is allocated."""


@contextmanager
def traced(steps: int, directory: Path, rank: int) -> Iterator[Callable[[], object]]:
    """Yields a function to call after each step; traces `steps` steps to `directory`/rank-00000.json.gz.

    With 0 steps nothing is traced.
    """
    if not steps:
        yield lambda: None
        return

    def write(record: profile) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        record.export_chrome_trace(str(directory / f"rank-{rank:05}.json.gz"))

    phases = schedule(wait=SKIPPED, warmup=WARM_UP, active=steps, repeat=1)
    with profile(schedule=phases, on_trace_ready=write) as record:
        yield record.step
