"""Measures the time of a step's collectives, those of FSDP and of context parallelism, with events in their streams.

A mark (event) does not synchronise, so every step is measured: two events per collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from ictx.stopwatch import Mark, mark, seconds_between, union, wait


class Collectives:
    """Records the times of this process's collectives, once `device` is set."""

    def __init__(self) -> None:
        self.device: torch.device | None = None
        """Device of the collectives; None disables the measurement."""
        self._spans: list[tuple[Mark, Mark]] = []

    def mark(self) -> Mark | None:
        """Returns a mark in the current stream."""
        return mark(self.device) if self.device else None

    def add(self, begin: Mark | None, end: Mark | None) -> None:
        """Adds a collective that ran between two marks."""
        if begin is not None and end is not None:
            self._spans.append((begin, end))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the collective that runs in the context, in the current stream."""
        begin = self.mark()
        yield
        self.add(begin, self.mark())

    def read(self) -> float:
        """Returns the seconds with at least one collective running, including waits for other ranks, and resets."""
        spans, self._spans = self._spans, []
        for _, end in spans:
            wait(end)
        first = spans[0][0] if spans else 0.0
        return union((seconds_between(first, begin), seconds_between(first, end)) for begin, end in spans)


COLLECTIVES = Collectives()
"""Collectives of this process. Global, because operations of torch.library accept no Python objects."""


class _AllGather(DefaultAllGather):
    """FSDP's all-gather, measured."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Gathers a layer's weights."""
        with COLLECTIVES.timed():
            return super().__call__(*args, **kwargs)


class _ReduceScatter(DefaultReduceScatter):
    """FSDP's reduce-scatter, and the all-reduce over replicas that follows in a separate stream (HSDP), measured."""

    _last: Mark | None = None

    def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Allocates the input, and later the result, which is the start of the collective."""
        self._last = COLLECTIVES.mark()
        return super().allocate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sums a layer's gradients over the ranks that shard it."""
        with COLLECTIVES.timed():
            work = super().__call__(*args, **kwargs)
        self._last = COLLECTIVES.mark()
        return work

    def summed(self, _: Tensor) -> None:
        """Hook after the all-reduce over replicas."""
        COLLECTIVES.add(self._last, COLLECTIVES.mark())


def observe(module: FSDPModule, replicated: bool) -> None:
    """Records the collectives of a sharded module in `COLLECTIVES`."""
    reduce_scatter = _ReduceScatter()
    module.set_custom_all_gather(_AllGather())
    module.set_custom_reduce_scatter(reduce_scatter)
    if replicated:
        module.set_all_reduce_hook(reduce_scatter.summed)
