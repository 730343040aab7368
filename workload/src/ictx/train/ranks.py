"""The ranks of a job: process group, device, collectives on Python objects, and SIGTERM."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from ictx.errors import UserError
from ictx.parallel.context import Context
from ictx.parallel.exchange import GROUPS
from ictx.parallel.mesh import Layout

T = TypeVar("T")
ALL_SHARD = Layout()
START = timedelta(minutes=30)
"""Timeout of collectives before the first step, while data is verified and the tracking server may not respond."""


@dataclass
class Ranks:
    """This process among the ranks that torchrun started; a single process without torchrun is the only rank."""

    rank: int
    count: int
    device: torch.device
    mesh: DeviceMesh
    """Device mesh for sharding, and replication with HSDP."""
    context: Context | None = None
    """Context parallel group: the ranks that share this rank's windows."""
    told_to_stop: bool = field(default=False)
    """Whether this process received SIGTERM: save a checkpoint at the next step and exit."""

    @property
    def part(self) -> tuple[int, int]:
        """Index of this rank's part of its windows' tokens, and the number of parts."""
        return (self.context.rank, self.context.count) if self.context else (0, 1)

    @property
    def data_rank(self) -> int:
        """Index of this rank's share of the windows (of `data_count`); equal for the ranks of a `context`."""
        return self.rank // self.part[1]

    @property
    def data_count(self) -> int:
        """Number of groups of ranks with different windows."""
        return self.count // self.part[1]

    @property
    def first(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    def limit(self, seconds: float) -> None:
        """Sets the timeout of training collectives, after which a missing rank fails the job."""
        context = [GROUPS[self.context.name]] if self.context else []
        for group in (None, *self.mesh.get_all_groups(), *context):
            _set_pg_timeout(timedelta(seconds=seconds), group)

    def say(self, text: str) -> None:
        """Prints on the first rank only."""
        if self.first:
            print(text, flush=True)

    def sums(self, counts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the sum of each count over the list and all ranks, on every rank; does not synchronize with a GPU."""
        names = list(counts[0])
        own = torch.stack([torch.stack([each[name] for name in names]) for each in counts]).sum(0)
        whole = own.to(self.device, torch.float64)
        dist.all_reduce(whole)
        return dict(zip(names, whole.unbind(), strict=True))

    def total(self, *values: float) -> list[float]:
        """Returns the sum of each value over all ranks, on every rank."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def largest(self, *values: float) -> list[float]:
        """Returns the maximum of each value over all ranks, on every rank."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [float(value) for value in tensor]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Records SIGTERM, which may arrive more than once (SLURM and torchrun both send it)."""
        self.told_to_stop = True


def on_all(call: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Runs a function on every rank; returns all ranks' results on every rank. `group` defaults to all ranks.

    If a call raises, every rank raises the error of the lowest rank that failed, so that no rank waits for it.
    """
    outcome: tuple[T | None, Exception | None]
    try:
        outcome = call(), None
    except (UserError, OSError) as error:
        outcome = None, error
    except Exception as error:
        # Other exception classes may not be picklable.
        outcome = None, RuntimeError(f"{type(error).__name__}: {error}")
    outcomes = [outcome] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome, group)
    for _, failed in outcomes:
        if failed:
            raise failed
    return [cast("T", value) for value, _ in outcomes]


def on_first(call: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs a function on the first rank; returns its result, or raises its error, on every rank."""
    return cast("T", on_all(lambda: call() if dist.get_rank() == 0 else None, group)[0])


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""Defaults of torchrun's environment variables for a process without it."""


@contextmanager
def joined(layout: Layout = ALL_SHARD) -> Iterator[Ranks]:
    """Joins the process group (NCCL on GPUs, else Gloo). Raises UserError if the layout does not match the ranks."""
    alone = {name: value for name, value in ALONE.items() if name not in os.environ}
    os.environ.update(alone)
    # Without it, fragmentation wastes a tenth of the memory of long sequences (docs/training.md).
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    # Enables the flight recorder, which the watchdog dumps for a hanging rank.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    on_gpu = device.type == "cuda"
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=START, device_id=device if on_gpu else None)
        layout = layout.of(dist.get_world_size())
        mesh, context = layout.sharding(device.type), layout.context(device.type)
        ranks = Ranks(dist.get_rank(), dist.get_world_size(), device, mesh, context)
        signal.signal(signal.SIGTERM, ranks._stop)
        yield ranks
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # Otherwise libraries that are used later (accelerate) would assume a launcher and join a group.
        for name in alone:
            os.environ.pop(name, None)
