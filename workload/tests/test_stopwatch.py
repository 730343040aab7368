"""The times of a step's parts add up to the step, with a manual clock; on a GPU without synchronization."""

from __future__ import annotations

import time

import pytest
import torch

from ictx.parallel.communication import Collectives
from ictx.stopwatch import Stopwatch


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Returns the time in seconds."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> Stopwatch:
    return Stopwatch(torch.device("cpu"), clock)


def test_laps_of_several_steps_add_up_to_them(watch: Stopwatch, clock: Clock) -> None:
    steps = 0.0
    for number in range(1, 4):
        began = clock()
        watch.start()
        for name, seconds in {"data": 0.25, "forward": 1.0 * number, "backward": 2.5, "optimizer": 0.125}.items():
            clock.now += seconds
            watch.lap(name)
        steps += clock() - began
        clock.now += 100  # between steps
    parts = watch.read()
    assert parts == pytest.approx({"data": 0.75, "forward": 6.0, "backward": 7.5, "optimizer": 0.375})
    assert sum(parts.values()) == pytest.approx(steps)


def test_a_reading_forgets_what_it_told(watch: Stopwatch, clock: Clock) -> None:
    assert watch.read() == {}
    watch.start()
    clock.now += 1
    watch.lap("forward")
    assert watch.read() == {"forward": 1}
    clock.now += 2
    watch.lap("checkpoint")
    assert watch.read() == {"checkpoint": 2}, "a lap starts at the end of the last one"


def test_a_lap_without_a_beginning_is_refused_by_name(watch: Stopwatch) -> None:
    with pytest.raises(RuntimeError, match="'forward' was not started"):
        watch.lap("forward")


def test_collectives_that_overlap_count_once() -> None:
    collectives = Collectives()
    assert collectives.mark() is None, "nothing is recorded while disabled"
    for begin, end in ((5.0, 7.0), (6.0, 8.0), (1.0, 2.0), (6.5, 7.5), (None, 9.0)):
        collectives.add(begin, end)
    assert collectives.read() == pytest.approx(4.0)
    assert collectives.read() == 0
    collectives.device = torch.device("cpu")
    with collectives.timed():
        time.sleep(0.01)
    assert 0.01 <= collectives.read() < 5


@pytest.mark.gpu
def test_a_gpu_is_timed_without_waiting_for_it() -> None:
    device = torch.device("cuda")
    watch = Stopwatch(device)
    matrix = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    watch.start()
    for _ in range(200):
        matrix @ matrix
    watch.lap("products")
    assert not torch.cuda.current_stream().query(), "the GPU must still be busy when the lap is marked"
    watch.lap("nothing")
    parts = watch.read()
    assert torch.cuda.current_stream().query()
    assert parts["products"] > 100 * parts["nothing"]
