"""`ictx bench train`: steps of the trainer's own model, optimizer and loss on random tokens, on each of several ranks.

A step's time is the median over the timed ones, between events on the GPU (the clock's without one); ranks wait for
each other in every step, so that the first one's stands for all. Memory and utilisation are the first rank's.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from ictx.bench.train_peer import peer
from ictx.data.loader import Batch
from ictx.errors import UserError
from ictx.kernels.attention.op import choice
from ictx.metrics import flops_per_token, model_flops_utilisation, peak_flops
from ictx.model import ModelConfig
from ictx.train.config import LoopConfig, OptimizerConfig
from ictx.train.loss import next_token_loss
from ictx.train.optimizer import new_optimizer
from ictx.train.ranks import Ranks, joined
from ictx.train.sharded import sharded_model
from ictx.train.stopwatch import Stopwatch

PARTS = ("forward", "backward", "optimizer")
WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """What is measured."""

    config: ModelConfig
    sequence: int
    batch: int = 1
    recompute: str = "selective"
    layers: int | None = None
    """Layers that compute again; all unless given."""
    compile: bool = False
    steps: int = 10
    implementation: str = "ictx"
    """`ictx`, or `transformers`: its DeepseekV3ForCausalLM under the same FSDP2, SDPA, everything computed again."""

    def __post_init__(self) -> None:
        for name in ("sequence", "batch", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: expected 1 or more")

    @property
    def loop(self) -> LoopConfig:
        """The trainer's settings."""
        return LoopConfig(
            self.steps, self.sequence, self.batch, recompute=self.recompute, recompute_layers=self.layers,
            compile=self.compile,
        )  # fmt: skip


@dataclass
class Row:
    """What was measured; seconds, and bytes of one rank."""

    implementation: str
    recompute: str
    layers: int | None
    compile: bool
    sequence: int
    batch: int
    ranks: int
    device: str
    torch: str
    attention: str = ""
    step: float | None = None
    tokens_per_second: float | None = None
    mfu_causal: float | None = None
    mfu: float | None = None
    utilisation: float | None = None
    """Mean over the timed steps of NVML's share of time in which a kernel ran."""
    parts: dict[str, float] = field(default_factory=dict)
    """Median seconds of forward, backward and optimizer (clipping among it)."""
    memory: dict[str, int] = field(default_factory=dict)
    """Weights, optimizer, gradients, the peak allocated, what of it is activations and workspace, and the peak that the
    allocator held."""
    loss: float | None = None
    note: str = ""


@contextmanager
def utilisation(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """Samples NVML's utilisation in the background; the yielded function returns the mean so far, 0 to 1."""
    samples: list[int] = []
    over = threading.Event()

    def sample(handle: Any, rate: Any) -> None:
        while not over.wait(0.05):
            samples.append(rate(handle).gpu)

    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        thread = threading.Thread(target=sample, args=(handle, pynvml.nvmlDeviceGetUtilizationRates), daemon=True)
        thread.start()
    except Exception:  # no NVML, no permission: measured is then nothing
        thread = None
    try:
        yield lambda: statistics.mean(samples) / 100 if samples else None
    finally:
        over.set()
        if thread:
            thread.join()


def random_batch(case: Case, ranks: Ranks) -> Batch:
    """Returns tokens of one document a row."""
    generator = torch.Generator().manual_seed(ranks.rank)
    tokens = torch.randint(case.config.vocab_size, (case.batch, case.sequence + 1), generator=generator)
    places = torch.arange(case.sequence).expand(case.batch, -1)
    return Batch(tokens[:, :-1], tokens[:, 1:], places, torch.zeros_like(places)).to(ranks.device)


def prepare(case: Case, ranks: Ranks) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    """Returns the model, and its loss of a batch."""
    if case.implementation == "transformers":
        model = peer(case.config, ranks.mesh, ranks.device, compiled=case.compile)
        return model, lambda batch: model(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss
    ours = sharded_model(case.config, case.loop, ranks)

    def mean(batch: Batch) -> Tensor:
        total, count, _ = next_token_loss(ours, batch, False)
        return total / count

    return ours, mean


def local_bytes(tensors: Iterator[Any]) -> int:
    """Returns what this rank holds of tensors."""
    shards = (x.to_local() if hasattr(x, "to_local") else x for x in tensors if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in shards)


def measure(case: Case, ranks: Ranks) -> Row:
    """Runs a case; every rank calls it."""
    on_gpu, device = ranks.device.type == "cuda", ranks.device
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    row = Row(
        case.implementation, case.recompute, case.layers, case.compile, case.sequence, case.batch, ranks.count, name,
        torch.__version__,
    )  # fmt: skip
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, loss_of = prepare(case, ranks)
    if case.implementation == "ictx":
        query = torch.empty(0, case.config.qk_head_dim, dtype=torch.bfloat16 if on_gpu else None, device=device)
        row.attention = choice("mla_attention", query, case.config.v_head_dim, case.batch).name
    optimizer, batch, watch = (
        new_optimizer(model, OptimizerConfig(), device),
        random_batch(case, ranks),
        Stopwatch(device),
    )
    gradients, measured = 0, []

    def step() -> Tensor:
        nonlocal gradients
        watch.start()
        loss = loss_of(batch)
        watch.lap("forward")
        loss.backward()  # type: ignore[no-untyped-call]
        watch.lap("backward")
        gradients = gradients or local_bytes(weight.grad for weight in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.lap("optimizer")
        return loss.detach()

    for _ in range(WARM_UP):
        loss = step()
    watch.read()
    with utilisation(device) as used:
        for _ in range(case.steps):
            loss = step()
            measured.append(watch.read())
        row.utilisation = used()
    row.loss = float(loss)
    row.parts = {part: statistics.median(one[part] for one in measured) for part in PARTS}
    row.step = statistics.median(sum(one.values()) for one in measured)
    row.tokens_per_second = ranks.count * case.batch * case.sequence / row.step
    peak = peak_flops(device)
    shares = model_flops_utilisation(
        row.tokens_per_second, flops_per_token(case.config, case.sequence), peak and peak * ranks.count
    )
    row.mfu_causal, row.mfu = shares.get("mfu_causal"), shares.get("mfu")
    held = {
        "weights": local_bytes(iter(model.parameters())),
        "optimizer": local_bytes(x for state in optimizer.state.values() for x in state.values()),
        "gradients": gradients,
    }
    row.memory = dict(held)
    if on_gpu:
        row.memory["peak"] = torch.cuda.max_memory_allocated()
        row.memory["activations and workspace"] = row.memory["peak"] - sum(held.values())
        row.memory["reserved"] = torch.cuda.max_memory_reserved()
    return row


def guarded(case: Case, ranks: Ranks) -> Row:
    """Runs a case; what does not fit the memory, or is not installed, is a row that says so."""
    try:
        return measure(case, ranks)
    except (ImportError, torch.OutOfMemoryError) as error:
        note = str(error).splitlines()[0][:120]
        return Row(
            case.implementation, case.recompute, case.layers, case.compile, case.sequence, case.batch, ranks.count,
            ranks.device.type, torch.__version__, note=note,
        )  # fmt: skip


def _rank(rank: int, count: int, port: int, cases: list[Case], out: str) -> None:
    """One rank's process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with joined() as ranks:
        for case in cases:
            row = guarded(case, ranks)
            torch._dynamo.reset()
            if ranks.first:
                with Path(out).open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")


def run(cases: list[Case], count: int) -> list[Row]:
    """Starts so many ranks on this machine and returns the first one's rows. Raises UserError for too few GPUs."""
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        raise UserError(f"--ranks is {count}: this machine has {torch.cuda.device_count()} GPUs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows"
        spawn(_rank, (count, port, cases, str(out)), nprocs=count)  # type: ignore[no-untyped-call]
        return [Row(**json.loads(line)) for line in out.read_text().splitlines()]
