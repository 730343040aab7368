"""Busy time of a GPU during a call, from the profiler's record of its kernels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

from ictx.stopwatch import union


@dataclass(frozen=True)
class Trace:
    """Kernels of several runs."""

    busy: float
    """Seconds per run in which at least one kernel ran."""
    kernels: list[tuple[str, int, float]]
    """Name, launches and seconds of each kernel per run, longest first; concurrent kernels count fully."""
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    """Name, begin and end of each kernel of all runs, in seconds."""

    def covered(self, part: str) -> tuple[float, float]:
        """Returns the seconds of all runs in which kernels named with `part` ran, and in which only those ran."""
        named = [(begin, end) for name, begin, end in self.spans if part in name]
        others = [(begin, end) for name, begin, end in self.spans if part not in name]
        return union(named), union(named + others) - union(others)


def trace(run: Callable[[], object], times: int) -> Trace | None:
    """Runs a call `times` times under the profiler; None if it records no kernels (no permission, no CUPTI)."""
    torch.cuda.synchronize()
    # There is only one cycle; without `acc_events`, PyTorch warns about lost events of earlier ones.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as record:
        for _ in range(times):
            run()
        torch.cuda.synchronize()
    events = [event for event in record.events() if event.device_type.name == "CUDA"]
    if not events:
        return None
    spans = [(event.time_range.start * 1e-6, event.time_range.end * 1e-6) for event in events]
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event, (begin, end) in zip(events, spans, strict=True):
        sums[event.name][0] += 1
        sums[event.name][1] += end - begin
    kernels = [(name, round(count / times), seconds / times) for name, (count, seconds) in sums.items()]
    named = [(event.name, *span) for event, span in zip(events, spans, strict=True)]
    return Trace(union(spans) / times, sorted(kernels, key=lambda kernel: -kernel[2]), named)
