"""The ranks of a job: who this is, on which device, and when to stop."""

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
"""How long ranks wait for each other until the first step: data are verified, a tracking server may be away."""


@dataclass
class Ranks:
    """This process among its equals, as torchrun started them; a single process is its own only rank."""

    rank: int
    count: int
    device: torch.device
    mesh: DeviceMesh
    """What weights are sharded over, and replicated where that is wanted."""
    context: Context | None = None
    """The ranks that share this one's windows."""
    told_to_stop: bool = field(default=False)
    """Whether this process got SIGTERM: save a checkpoint at the next step and end."""

    @property
    def part(self) -> tuple[int, int]:
        """Which part of its windows' tokens this rank has, and of how many."""
        return (self.context.rank, self.context.count) if self.context else (0, 1)

    @property
    def data_rank(self) -> int:
        """Which of `data_count` shares of the windows this rank has; ranks of one `context` have the same."""
        return self.rank // self.part[1]

    @property
    def data_count(self) -> int:
        """Groups of ranks that have windows of their own."""
        return self.count // self.part[1]

    @property
    def first(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    def limit(self, seconds: float) -> None:
        """From here on a rank that does not take part in a collective of the training for so long ends the job."""
        context = [GROUPS[self.context.name]] if self.context else []
        for group in (None, *self.mesh.get_all_groups(), *context):
            _set_pg_timeout(timedelta(seconds=seconds), group)

    def say(self, text: str) -> None:
        """Prints once for all ranks."""
        if self.first:
            print(text, flush=True)

    def sums(self, counts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the sum of each count over a list and all ranks, the same everywhere, without waiting for a GPU."""
        names = list(counts[0])
        own = torch.stack([torch.stack([each[name] for name in names]) for each in counts]).sum(0)
        whole = own.to(self.device, torch.float64)
        dist.all_reduce(whole)
        return dict(zip(names, whole.unbind(), strict=True))

    def total(self, *values: float) -> list[float]:
        """Returns the sum of each value over all ranks, the same everywhere."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def largest(self, *values: float) -> list[float]:
        """Returns the largest of each value over all ranks, the same everywhere."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [float(value) for value in tensor]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Remembers SIGTERM; the signal may come more than once (SLURM and torchrun both send it)."""
        self.told_to_stop = True


def on_all(call: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns what each rank's call returns, on every rank; `group` is the one of all ranks, unless given another.

    No rank waits for one that failed: what a call raises, the lowest rank's first, every rank raises.
    """
    outcome: tuple[T | None, Exception | None]
    try:
        outcome = call(), None
    except (UserError, OSError) as error:
        outcome = None, error
    except Exception as error:
        # Other classes need not survive the way to the other ranks.
        outcome = None, RuntimeError(f"{type(error).__name__}: {error}")
    outcomes = [outcome] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome, group)
    for _, failed in outcomes:
        if failed:
            raise failed
    return [cast("T", value) for value, _ in outcomes]


def on_first(call: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Returns what the first rank's call returns, on every rank; what it raises, every rank raises."""
    return cast("T", on_all(lambda: call() if dist.get_rank() == 0 else None, group)[0])


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What torchrun sets, for a process that runs without it."""


@contextmanager
def joined(layout: Layout = ALL_SHARD) -> Iterator[Ranks]:
    """Joins the process group: NCCL on GPUs, Gloo without. Raises UserError for a layout of another number of ranks."""
    alone = {name: value for name, value in ALONE.items() if name not in os.environ}
    os.environ.update(alone)
    # Memory that grows in place: without it a tenth of a long sequence's lies in gaps (docs/training.md).
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    # The last collectives, which a rank that hangs leaves behind.
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
        # Libraries that are used afterwards (accelerate) take them for a launcher's, and join a group of their own.
        for name in alone:
            os.environ.pop(name, None)
