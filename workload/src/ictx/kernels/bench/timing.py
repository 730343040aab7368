"""Times of short calls, and a GPU's measured bandwidth and product rate."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch


def median_time(calls: list[Callable[[], object]], repeats: int = 15) -> float:
    """Returns the median time of one call in seconds, over replays of a graph that makes each call in turn.

    Calls that take more than a tenth of a second are measured five times.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    # Wait for pending writes to the inputs.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        begun = time.perf_counter()
        calls[0]()
        stream.synchronize()
    times = max(1, 8 // len(calls)) * len(calls)
    if time.perf_counter() - begun > 0.1:
        times, repeats = 1, 5
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(times):
            calls[index % len(calls)]()
    graph.replay()
    measured = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        measured.append(begin.elapsed_time(end) / times * 1e-3)
    return float(sorted(measured)[repeats // 2])


def copy_bandwidth() -> float:
    """Returns the best of several device-to-device copies in bytes read and written per second."""
    best = 0.0
    for size in (1 << 28, 1 << 30, 1 << 31):
        sources = [torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda") for _ in range(2)]
        target = torch.empty_like(sources[0])
        calls: list[Callable[[], object]] = [functools.partial(target.copy_, source) for source in sources]
        best = max(best, 2 * size / median_time(calls))
        # Free the memory for the next size.
        del sources, target, calls
        torch.cuda.empty_cache()
    return best


def matrix_rate() -> float:
    """Returns the rate of a bfloat16 product of two 8192 × 8192 matrices in operations per second."""
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / median_time([lambda: left @ right])
