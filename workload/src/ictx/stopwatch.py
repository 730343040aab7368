"""Measures the parts of training steps with marks on the device's clock, read when a record is logged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

Mark = float | torch.cuda.Event


def mark(device: torch.device, clock: Callable[[], float] = time.monotonic) -> Mark:
    """Records an event in a GPU's current stream, without synchronizing; on other devices returns the clock's time."""
    if device.type != "cuda":
        return clock()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class Stopwatch:
    """Seconds between marks, summed by the name of the lap that each mark ends.

    On a GPU a mark is an event in the current stream: setting it does not synchronize, and its time is when the GPU
    reaches it. On other devices it is the clock's time. Work on other streams (communication) counts only while the
    current stream waits for it.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        """Creates a stopwatch without laps.

        Args:
            device: where the steps run.
            clock: returns seconds of a monotonic clock; not used on GPUs.
        """
        self._device, self._clock = device, clock
        self._last: Mark | None = None
        self._laps: list[tuple[str, Mark, Mark]] = []

    def start(self) -> None:
        """Starts the next lap; excludes the time since the last one."""
        self._last = mark(self._device, self._clock)

    def lap(self, name: str) -> None:
        """Ends a lap and starts the next one. Raises RuntimeError before the first `start`."""
        if self._last is None:
            raise RuntimeError(f"the lap {name!r} was not started: call start() first")
        now = mark(self._device, self._clock)
        self._laps.append((name, self._last, now))
        self._last = now

    def read(self) -> dict[str, float]:
        """Returns and resets the seconds of each lap name; waits for the last mark."""
        laps, self._laps = self._laps, []
        wait(laps[-1][2] if laps else 0.0)
        total: dict[str, float] = {}
        for name, begin, end in laps:
            total[name] = total.get(name, 0.0) + seconds_between(begin, end)
        return total


def wait(mark: Mark) -> None:
    """Waits until the GPU has reached a mark; returns immediately for a clock's mark."""
    if isinstance(mark, torch.cuda.Event):
        mark.synchronize()


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Returns the total length of the union of spans (begin, end)."""
    total, reached = 0.0, -float("inf")
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def seconds_between(begin: Mark, end: Mark) -> float:
    """Returns the seconds from one mark to a later one of the same kind."""
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(begin.elapsed_time(end)) / 1000
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin
