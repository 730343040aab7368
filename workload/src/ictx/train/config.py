"""Settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ictx.data.config import DataConfig
from ictx.model import ModelConfig
from ictx.parallel import MODES, Layout
from ictx.settings import build, config_path, load_yaml, override

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay."""

    learning_rate: float = 3e-4
    """Highest learning rate."""
    final_share: float = 0.1
    """Learning rate at the last step, as a share of the highest."""
    warmup_steps: int = 100
    """Steps until the highest learning rate."""
    weight_decay: float = 0.1
    """Decay of the matrices; norms have none."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    clip_norm: float = 1.0
    """Longest gradient."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: expected more than 0")
        for name in ("warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 or more")
        for name in ("beta1", "beta2", "final_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 or more, and less than 1")


@dataclass(frozen=True)
class LoopConfig:
    """How long, on how much, how often."""

    steps: int
    """Optimizer steps."""
    sequence_length: int
    """Tokens of a window."""
    batch_size: int
    """Windows of a rank and step."""
    dtype: str = "bfloat16"
    """Dtype of the computation on GPUs, and of the exported weights; weights are kept in float32 while training."""
    mask_documents: bool = False
    """Keep attention within documents, with positions that begin anew in each; else a window is one text."""
    recompute: str = "selective"
    """What backward computes again instead of keeping it: `none`, `selective` (all but attention's result), `full`."""
    recompute_layers: int | None = None
    """Layers that do so, the first ones; all of them unless given."""
    offload: bool = False
    """Keep what `selective` and `full` keep, layers' inputs among it, in the host's memory: for very long windows."""
    compile: bool = False
    """Compile each layer with torch.compile; layers with experts stay as they are."""
    deterministic: bool = False
    """The same bits in each run on a GPU: libraries that are faster, and do not promise that, are not used."""
    seed: int = 0
    """Weights and order of the data."""
    log_every: int = 10
    """Steps between two records of the loss."""
    validate_every: int = 100
    """Steps between two looks at the validation data."""
    validation_batches: int = 8
    """Batches of a rank at each look."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that stay."""
    bad_steps: int = 10
    """Steps in a row whose loss or gradient is not finite: they change no weights; one more ends the run."""

    def __post_init__(self) -> None:
        for name in [
            "steps",
            "sequence_length",
            "batch_size",
            "log_every",
            "validate_every",
            "validation_batches",
            "checkpoint_every",
            "keep_checkpoints",
        ]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")
        for name, allowed in {"dtype": DTYPES, "recompute": MODES}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if self.offload and (self.compile or self.recompute == "none" or self.recompute_layers is not None):
            raise ValueError("offload is true: expected compile: false, and all layers to compute again")
        for name in ("bad_steps", "recompute_layers"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 or more")


@dataclass(frozen=True)
class RunConfig:
    """Where results go."""

    dir: Path | None = None
    """Checkpoints, metrics and the exported model."""
    experiment: str = "pretrain"
    """MLflow experiment."""
    model_name: str | None = None
    """Registered model; `ictx-<name of the model's file>` unless given, nothing is registered if empty."""
    alias: str = "candidate"
    """Alias that the registered version gets."""
    tracking_patience: float = 300.0
    """Seconds for which the beginning and the end of a run wait for a tracking server that does not answer."""


@dataclass(frozen=True)
class StageConfig:
    """A run of any stage."""

    model: ModelConfig
    """Sizes of the model."""
    train: LoopConfig
    """The loop."""
    parallel: Layout = field(default_factory=Layout)
    """Ranks along the axes of the mesh."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    run: RunConfig = field(default_factory=RunConfig)
    """The results."""

    def __post_init__(self) -> None:
        if self.train.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"train.sequence_length is {self.train.sequence_length}: expected at most "
                f"model.max_position_embeddings, {self.model.max_position_embeddings}"
            )
        self.parallel.check_model(self.model.num_attention_heads, self.train.sequence_length)


@dataclass(frozen=True)
class PretrainConfig(StageConfig):
    """A pretraining run."""

    data: DataConfig = field(default_factory=DataConfig)
    """The corpus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.vocab_size != self.model.vocab_size:
            raise ValueError(
                f"data.vocab_size is {self.data.vocab_size}: expected model.vocab_size, {self.model.vocab_size}"
            )


def read(name: str, assignments: list[str]) -> dict[str, Any]:
    """Returns a run's settings as plain values.

    `model: NAME` is replaced by the content of configs/model/NAME.yaml; the corpus gets the model's vocabulary unless
    it says otherwise.
    """
    content = load_yaml(config_path(name))
    model = content.get("model")
    if isinstance(model, str):
        content["model"] = load_yaml(config_path(f"model/{model}.yaml"))
        if isinstance(run := content.get("run", {}), dict):
            content["run"] = {"model_name": f"ictx-{model}", **run}
    content = override(content, assignments)
    if isinstance(content.get("model"), dict) and isinstance(content.setdefault("data", {}), dict):
        content["data"].setdefault("vocab_size", content["model"].get("vocab_size"))
    return content


def load(name: str, assignments: list[str]) -> PretrainConfig:
    """Reads a run's settings. Raises UserError naming what is wrong in them."""
    return build(PretrainConfig, read(name, assignments))
