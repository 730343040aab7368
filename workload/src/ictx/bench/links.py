"""Bus bandwidth of collectives between ranks, as NVIDIA's nccl-tests define it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from ictx.train.ranks import Ranks

SIZE, TIMES = 1 << 30, 5
"""Bytes of a collective's larger buffer on each rank, and the number of timed calls after a warm-up."""


def bandwidths(ranks: Ranks) -> dict[str, float]:
    """Returns bytes/s of each collective over all ranks (doc/PERFORMANCE.md of nccl-tests); for GPUs."""
    count = ranks.count
    whole = torch.zeros(SIZE // 2, dtype=torch.bfloat16, device=ranks.device)
    part, other = whole.new_empty(len(whole) // count), torch.empty_like(whole)
    collectives: dict[str, tuple[Callable[[], object], float]] = {
        "all_reduce": (lambda: dist.all_reduce(whole), 2 * (count - 1) / count),
        "all_gather": (lambda: dist.all_gather_into_tensor(whole, part), (count - 1) / count),
        "reduce_scatter": (lambda: dist.reduce_scatter_tensor(part, whole), (count - 1) / count),
        "all_to_all": (lambda: dist.all_to_all_single(other, whole), (count - 1) / count),
    }
    return {name: share * SIZE / seconds(run, ranks.device, TIMES) for name, (run, share) in collectives.items()}


def seconds(run: Callable[[], object], device: torch.device, times: int) -> float:
    """Returns the mean seconds per call over `times` calls after a warm-up."""
    run()
    if device.type != "cuda":
        begun = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - begun) / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / times
