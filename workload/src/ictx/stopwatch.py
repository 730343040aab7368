"""Where the time of training steps goes: marks on the device's own clock, read when a record is due."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

Mark = float | torch.cuda.Event


def mark(device: torch.device, clock: Callable[[], float] = time.monotonic) -> Mark:
    """Returns when the current stream of a GPU gets here, without waiting for that; elsewhere the clock's time."""
    if device.type != "cuda":
        return clock()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class Stopwatch:
    """Seconds between marks, by the name of what happened before the mark.

    On a GPU a mark is an event in the current stream: setting it waits for nothing, and its time is that at which the
    GPU gets there. Elsewhere it is the clock's time. Work on other streams (communication) counts where the current
    stream waits for it.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins with nothing measured.

        Args:
            device: where the steps run.
            clock: seconds of a clock that never goes back; a GPU's events do not need it.
        """
        self._device, self._clock = device, clock
        self._last: Mark | None = None
        self._laps: list[tuple[str, Mark, Mark]] = []

    def start(self) -> None:
        """Begins the next lap here: what has happened since the last one does not count."""
        self._last = mark(self._device, self._clock)

    def lap(self, name: str) -> None:
        """Ends a lap and begins the next. Raises RuntimeError before the first `start`."""
        if self._last is None:
            raise RuntimeError(f"the lap {name!r} has no beginning: call start() first")
        now = mark(self._device, self._clock)
        self._laps.append((name, self._last, now))
        self._last = now

    def read(self) -> dict[str, float]:
        """Returns the seconds of each name since the last reading, and forgets them; waits for the last mark."""
        laps, self._laps = self._laps, []
        wait(laps[-1][2] if laps else 0.0)
        total: dict[str, float] = {}
        for name, begin, end in laps:
            total[name] = total.get(name, 0.0) + seconds_between(begin, end)
        return total


def wait(mark: Mark) -> None:
    """Waits until a GPU has got to a mark."""
    if isinstance(mark, torch.cuda.Event):
        mark.synchronize()


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Returns the length of what the spans (begin, end) cover together."""
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
