"""How long a step's collectives take: those of FSDP and of context parallelism, between marks in their own streams.

A mark waits for nothing, so that every step has them: two events for each collective.
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
    """When this process's collectives ran, once it is switched on."""

    def __init__(self) -> None:
        self.device: torch.device | None = None
        """Where they run; nothing is noted without one."""
        self._spans: list[tuple[Mark, Mark]] = []

    def mark(self) -> Mark | None:
        """Returns a mark in the current stream."""
        return mark(self.device) if self.device else None

    def add(self, begin: Mark | None, end: Mark | None) -> None:
        """Adds one that ran between two marks."""
        if begin is not None and end is not None:
            self._spans.append((begin, end))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds what runs within, in the current stream."""
        begin = self.mark()
        yield
        self.add(begin, self.mark())

    def read(self) -> float:
        """Returns the seconds in which at least one ran, waiting for other ranks included, and forgets them."""
        spans, self._spans = self._spans, []
        for _, end in spans:
            wait(end)
        first = spans[0][0] if spans else 0.0
        return union((seconds_between(first, begin), seconds_between(first, end)) for begin, end in spans)


COLLECTIVES = Collectives()
"""Those of this process: operations of torch.library, which are among them, take no objects."""


class _AllGather(DefaultAllGather):
    """FSDP's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Gathers a layer's weights."""
        with COLLECTIVES.timed():
            return super().__call__(*args, **kwargs)


class _ReduceScatter(DefaultReduceScatter):
    """FSDP's, and the sum over replicas that follows it in a stream of its own (HSDP)."""

    _last: Mark | None = None

    def allocate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the memory of its input, and later of its result; then it begins."""
        self._last = COLLECTIVES.mark()
        return super().allocate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Sums a layer's gradients over the ranks that shard it."""
        with COLLECTIVES.timed():
            work = super().__call__(*args, **kwargs)
        self._last = COLLECTIVES.mark()
        return work

    def summed(self, _: Tensor) -> None:
        """Follows the sum over replicas."""
        COLLECTIVES.add(self._last, COLLECTIVES.mark())


def observe(module: FSDPModule, replicated: bool) -> None:
    """Makes the collectives of a sharded module known to `COLLECTIVES`."""
    reduce_scatter = _ReduceScatter()
    module.set_custom_all_gather(_AllGather())
    module.set_custom_reduce_scatter(reduce_scatter)
    if replicated:
        module.set_all_reduce_hook(reduce_scatter.summed)
