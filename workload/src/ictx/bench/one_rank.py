"""The first rank of a job in a single process, to measure its computation and memory without the other ranks' devices.

Each collective copies this rank's own data to where the other ranks' data would arrive. All ranks of a job hold equal
shapes, so memory and computation are those of a real rank. Results are meaningless, and communication takes the time of
a copy on one device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, _create_work_from_future  # type: ignore[attr-defined]

from ictx.parallel import Layout
from ictx.train.ranks import Ranks

BACKEND = "one_rank"


# Signatures and names of its methods differ between PyTorch's releases.
_ProcessGroup: Any = dist.ProcessGroup


class OneRank(_ProcessGroup):  # type: ignore[misc]
    """The group that one process sees of `size` ranks."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._rank, self._size = rank, size

    def getBackendName(self) -> str:
        """Returns the backend's name."""
        return BACKEND

    @property
    def group_name(self) -> str:
        """Name under which PyTorch registered the group: that of the base class is empty for groups in Python."""
        return str(dist.distributed_c10d._world.pg_names[self])

    def allreduce(self, tensors: Sequence[Tensor], *options: Any) -> dist.Work:
        """Leaves the tensors as they are."""
        return _done(tensors)

    broadcast = allreduce_coalesced = allreduce

    def barrier(self, *options: Any) -> dist.Work:
        """Returns at once."""
        return _done([])

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], *options: Any) -> dist.Work:
        """Copies each input to every rank's output."""
        for parts, own in zip(outputs, inputs, strict=True):
            for part in parts:
                part.copy_(own)
        return _done(outputs)

    def all_gather_single(self, output: Tensor, own: Tensor, *options: Any) -> dist.Work:
        """Copies the input to every rank's part of the output."""
        output.view(self._size, -1).copy_(own.reshape(1, -1).expand(self._size, -1))
        return _done([output])

    def reduce_scatter_single(self, output: Tensor, parts: Tensor, *options: Any) -> dist.Work:
        """Copies this rank's part of the input to the output."""
        output.view(-1).copy_(parts.reshape(self._size, -1)[self._rank])
        return _done([output])

    def all_to_all_single(self, output: Tensor, parts: Tensor, *options: Any) -> dist.Work:
        """Copies the input to the output."""
        output.copy_(parts)
        return _done([output])

    _allgather_base, _reduce_scatter_base, alltoall_base = all_gather_single, reduce_scatter_single, all_to_all_single


def _done(result: Any) -> dist.Work:
    future: Any = torch.futures.Future()
    future.set_result(result)
    return cast(dist.Work, _create_work_from_future(future))


def _group(prefix_store: Any, rank: int, size: int, timeout: Any) -> OneRank:
    return OneRank(rank, size)


@contextmanager
def simulated(layout: Layout, count: int) -> Iterator[Ranks]:
    """Joins a simulated job of `count` ranks as its first rank. Raises UserError if the layout does not match."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if not hasattr(dist.Backend, BACKEND.upper()):
        dist.Backend.register_backend(BACKEND, _group, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, store=HashStore(), rank=0, world_size=count)
    try:
        layout = layout.of(count)
        yield Ranks(0, count, device, layout.sharding(device.type), layout.context(device.type))
    finally:
        dist.destroy_process_group()
