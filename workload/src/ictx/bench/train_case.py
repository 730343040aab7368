"""Cases and results of `ictx bench train`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ictx.data.loader import Batch
from ictx.errors import UserError
from ictx.model import ModelConfig
from ictx.train.config import LoopConfig
from ictx.train.ranks import Ranks


@dataclass(frozen=True)
class Case:
    """A case to measure."""

    config: ModelConfig
    sequence: int
    batch: int = 1
    recompute: str = "selective"
    layers: int | None = None
    """Number of layers with recompute; default: all."""
    compile: bool = False
    steps: int = 10
    implementation: str = "ictx"
    """`ictx`; `ddp`: the same model and recompute under DistributedDataParallel; or `transformers`: its
    DeepseekV3ForCausalLM under the same FSDP2, with SDPA and recompute of everything."""
    warm_up: int = 3
    """Steps before the timed ones."""
    offload: bool = False
    """Whether activations for the backward pass are offloaded to host memory."""
    profile: bool = False
    """Whether to profile another step for the share of communication; if only one step is timed, that one."""
    dtype: str = "bfloat16"
    """Dtype of the computation on GPUs."""
    fp8: str = "none"
    """The trainer's recipe for linear products, or `none`."""

    def __post_init__(self) -> None:
        for name in ("sequence", "batch", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: expected 1 or more")
        if self.warm_up < 0:
            raise UserError(f"warm_up is {self.warm_up}: expected 0 or more")

    @property
    def loop(self) -> LoopConfig:
        """The trainer's settings."""
        return LoopConfig(
            self.steps, self.sequence, self.batch, self.dtype, recompute=self.recompute, recompute_layers=self.layers,
            compile=self.compile, offload=self.offload, fp8=self.fp8,
        )  # fmt: skip


@dataclass
class Row:
    """Results; times in seconds, memory in bytes of one rank."""

    implementation: str
    recompute: str
    layers: int | None
    compile: bool
    sequence: int
    batch: int
    ranks: int
    device: str
    torch: str
    dp_replicate: int = 1
    cp: int = 1
    offload: bool = False
    fp8: str = "none"
    cap: float | None = None
    """Maximum bytes of a rank."""
    simulated: bool = False
    """Whether only the first rank ran, with copies instead of communication: rates are those without communication."""
    attention: str = ""
    step: float | None = None
    tokens_per_second: float | None = None
    mfu_causal: float | None = None
    mfu: float | None = None
    utilisation: float | None = None
    """NVML's share of time in which a kernel ran, mean over the timed steps."""
    parts: dict[str, float] = field(default_factory=dict)
    """Median seconds of forward, backward and optimizer (including clipping)."""
    communication: float | None = None
    """Share of a step's time in which NCCL's kernels ran."""
    waiting: float | None = None
    """Share in which only NCCL's kernels ran."""
    links: dict[str, float] = field(default_factory=dict)
    """Bus bandwidth in bytes/s by collective, as nccl-tests define it."""
    peaks: list[int] = field(default_factory=list)
    """Peak allocated bytes, by rank."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes of weights, optimizer and gradients, peak allocated bytes, the part of them that is activations and
    workspace, and peak reserved bytes."""
    loss: float | None = None
    note: str = ""


def random_batch(case: Case, ranks: Ranks) -> Batch:
    """Returns a rank's part of the windows 0, 1, … of a step, one document each; the same for any number of ranks."""
    rows = []
    for window in range(ranks.data_rank * case.batch, (ranks.data_rank + 1) * case.batch):
        generator = torch.Generator().manual_seed(window)
        rows.append(torch.randint(case.config.vocab_size, (case.sequence + 1,), generator=generator))
    tokens, places = torch.stack(rows), torch.arange(case.sequence).expand(case.batch, -1)
    return Batch(tokens[:, :-1], tokens[:, 1:], places, torch.zeros_like(places)).part(*ranks.part).to(ranks.device)


def row_of(case: Case, ranks: Ranks, note: str = "") -> Row:
    """Returns a row with the case's settings, without results."""
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
    replicate = ranks.count if case.implementation == "ddp" else ranks.mesh.size(0) if ranks.mesh.ndim == 2 else 1
    return Row(
        case.implementation, case.recompute, case.layers, case.compile, case.sequence, case.batch, ranks.count, name,
        torch.__version__, replicate, ranks.part[1], case.offload, note=note,
        fp8=case.fp8 if case.implementation == "ictx" else "none",
    )  # fmt: skip
