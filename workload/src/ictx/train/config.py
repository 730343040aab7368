"""Settings of a training run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ictx.data.config import DataConfig
from ictx.model import ModelConfig
from ictx.parallel import MODES, Layout
from ictx.parallel.float8 import RECIPES
from ictx.settings import build, config_path, load_yaml, override, shown
from ictx.track.config import TrackConfig

DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "wsd")
LONGEST_TIMEOUT = 7 * 86400.0
MODEL_NAME = re.compile(r"\w([\w .+-]{0,198}[\w.+-])?")
"""Names that `models:/NAME@ALIAS` and a registry search accept."""
ALIAS = re.compile(r"(?!v\d+$|latest$)[A-Za-z0-9_-]{1,200}", re.IGNORECASE)
"""Aliases that MLflow accepts: `latest` and `v1` would be parsed as versions."""


TRAINING_ONLY = {"initializer_range", "mtp_loss_weight", "moe.balance_loss_weight", "moe.bias_update_speed"}
"""Model settings that affect only training, not the model's output: they may change when a run resumes."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate schedule: a linear warm-up, then a decay."""

    name: str = "adamw"
    """`adamw`, or `muon`: Muon for the layers' matrices and AdamW for all other weights."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: str = "cosine"
    """`cosine`: decays after the warm-up; `wsd` (warm-up, stable, decay): decays in the last `decay_steps`."""
    decay_steps: int | None = None
    """Steps of the decay of `wsd`; default: a tenth of all steps."""
    final_share: float = 0.1
    """Learning rate at the last step, relative to the peak."""
    warmup_steps: int = 100
    """Steps until the peak learning rate."""
    weight_decay: float = 0.1
    """Weight decay of matrices; norms have none."""
    beta1: float = 0.9
    """Decay rate of the first moment (mean of gradients)."""
    beta2: float = 0.95
    """Decay rate of the second moment (mean of squared gradients)."""
    clip_norm: float = 1.0
    """Maximum gradient norm; larger gradients are clipped."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: expected more than 0")
        for name, allowed in {"name": OPTIMIZERS, "schedule": SCHEDULES}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if self.decay_steps is not None and (self.decay_steps < 1 or self.schedule != "wsd"):
            raise ValueError(f"decay_steps is {self.decay_steps}: expected 1 or more, and schedule: wsd")
        for name in ("warmup_steps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 or more")
        for name in ("beta1", "beta2", "final_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 or more, and less than 1")


@dataclass(frozen=True)
class LoraConfig:
    """LoRA: trains low-rank matrices instead of the model's weights (arXiv:2106.09685)."""

    rank: int = 16
    """Rank of the matrices."""
    alpha: float = 32.0
    """Their output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout probability of their inputs in training."""
    targets: tuple[str, ...] | None = None
    """Names of the layers' matrices to adapt, such as q_b_proj and o_proj; default: all matrices of attention and
    feed-forward."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}: expected 1 or more")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}: expected more than 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: expected 0 or more, and less than 1")
        if self.targets == ():
            raise ValueError("targets is empty: expected names of matrices, or none for all")

    @property
    def scale(self) -> float:
        """Factor of the adapter's output."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoopConfig:
    """The training loop: steps, batch, precision, memory, logging, checkpoints and error handling."""

    steps: int
    """Optimizer steps."""
    sequence_length: int
    """Tokens per window."""
    batch_size: int
    """Windows per rank in each forward and backward pass."""
    dtype: str = "bfloat16"
    """Dtype of the computation on GPUs and of the exported weights; master weights are float32."""
    mask_documents: bool = False
    """Restrict attention to within documents, and restart positions at each document; default: no boundaries."""
    recompute: str = "selective"
    """Activation recomputation in backward: `none`, `selective` (all but attention's output), `full`; `auto`: as little
    as the GPU's memory allows (`ictx.parallel.memory`), and `selective` without a GPU."""
    recompute_layers: int | None = None
    """Number of layers, from the first, that recompute; default: all."""
    offload: bool = False
    """Store saved activations of `selective` and `full` in host memory: for very long windows."""
    fp8: str = "none"
    """torchao recipe for computing the layers' linear products in fp8: `tensorwise`, `rowwise`, `rowwise_with_gw_hp`;
    `none`: in `dtype`. Needs a GPU with fp8."""
    compile: bool = False
    """Compile each layer with torch.compile, except layers with experts."""
    deterministic: bool = False
    """Bitwise reproducible results on a GPU; disables faster libraries that are not deterministic."""
    accumulate: int = 1
    """Gradient accumulation: forward and backward passes per step."""
    reduce_once: bool = False
    """Reduce gradients over ranks once per step instead of in each backward: less traffic, but more memory."""
    z_loss: float = 0.0
    """Weight of the z-loss, the mean of log² Z with Z the softmax denominator: 1e-4 in PaLM; 0: disabled."""
    seed: int = 0
    """Random seed of the initial weights and the data order."""
    log_every: int = 10
    """Steps between log records."""
    validate_every: int = 100
    """Steps between evaluations on the validation data."""
    validation_windows: int = 64
    """Windows per evaluation, independent of the number of ranks and the batch size."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    bad_steps: int = 10
    """Maximum consecutive skipped steps (loss or gradient not finite, or a spike) before a roll-back."""
    roll_backs: int = 3
    """Maximum consecutive roll-backs to the last checkpoint, skipping the data since then, before the run fails."""
    skip_spikes: float = 0.0
    """Skip steps whose loss or gradient norm exceeds the recent mean by this many standard deviations; 0: disabled."""
    timeout: float = 600.0
    """Seconds without progress of a rank after which the job fails; the hanging rank is reported shortly before."""
    lora: LoraConfig | None = None
    """Train a LoRA adapter beside frozen weights; requires a parent (`init`)."""
    profile: int = 0
    """Number of steps to trace to run.dir/profile, after warm-up steps."""

    def __post_init__(self) -> None:
        for name in [
            "steps",
            "sequence_length",
            "batch_size",
            "accumulate",
            "log_every",
            "validate_every",
            "validation_windows",
            "checkpoint_every",
            "keep_checkpoints",
        ]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")
        for name, allowed in {"dtype": DTYPES, "recompute": (*MODES, "auto"), "fp8": ("none", *RECIPES)}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if self.lora and self.fp8 != "none":
            raise ValueError(f"fp8 is {self.fp8}: expected none with train.lora")
        if self.offload and (self.compile or self.recompute == "none" or self.recompute_layers is not None):
            raise ValueError(
                "offload is true: expected compile: false, recompute other than none, and no recompute_layers"
            )
        if self.fp8 != "none" and not (self.compile and self.dtype == "bfloat16"):
            raise ValueError(
                f"fp8 is {self.fp8!r}: expected compile: true (casts are too slow without it) and dtype: bfloat16"
            )
        if self.recompute == "auto" and (self.offload or self.recompute_layers is not None):
            raise ValueError("recompute is 'auto': expected offload: false, and no recompute_layers")
        for name in ("bad_steps", "recompute_layers", "roll_backs", "skip_spikes", "profile", "z_loss"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 or more")
        if not 1 <= self.timeout <= LONGEST_TIMEOUT:
            raise ValueError(f"timeout is {self.timeout}: expected 1 to {LONGEST_TIMEOUT:.0f} seconds")


@dataclass(frozen=True)
class RunConfig:
    """Output folder and registration of the results."""

    dir: Path | None = None
    """Checkpoints, metrics and the exported model."""
    start_from: Path | None = None
    """Checkpoint of another run to start from, for example for a separate decay: RUN/checkpoints/step-00001000."""
    experiment: str = "pretrain"
    """MLflow experiment."""
    model_name: str | None = None
    """Registered model; default: `ictx-<name of the model's file>`; if empty, nothing is registered."""
    alias: str = "candidate"
    """Alias to set on the registered version."""
    tracking_patience: float = 300.0
    """Seconds that the start and the end of a run wait for a tracking server that does not respond."""

    def __post_init__(self) -> None:
        if self.model_name and not MODEL_NAME.fullmatch(self.model_name):
            raise ValueError(f"model_name is {shown(self.model_name)}: expected letters, digits, spaces and . _ + -")
        if not ALIAS.fullmatch(self.alias):
            raise ValueError(
                f"alias is {shown(self.alias)}: expected letters, digits, - and _, but not latest or a version, v1"
            )
        if not self.experiment.strip() or not self.experiment.isprintable():
            raise ValueError(f"experiment is {shown(self.experiment)}: expected a name")
        if not 0 <= self.tracking_patience < math.inf:
            raise ValueError(f"tracking_patience is {self.tracking_patience}: expected 0 or more")


@dataclass(frozen=True)
class StageConfig:
    """Settings common to all stages."""

    model: ModelConfig
    """Model configuration."""
    train: LoopConfig
    """Training loop."""
    init: str = ""
    """Initial model: models:/NAME/VERSION, models:/NAME@ALIAS, or run:/FOLDER for the export of one of your runs."""
    parallel: Layout = field(default_factory=Layout)
    """Sizes of the device mesh."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    run: RunConfig = field(default_factory=RunConfig)
    """Results."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """Tracking in MLflow and W&B."""

    def __post_init__(self) -> None:
        if self.train.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"train.sequence_length is {self.train.sequence_length}: expected at most "
                f"model.max_position_embeddings, {self.model.max_position_embeddings}"
            )
        self.parallel.check_model(self.model.num_attention_heads, self.train.sequence_length)
        lora = self.train.lora
        if lora and self.parallel.cp > 1 and "kv_b_proj" in (lora.targets or ("kv_b_proj",)):
            raise ValueError("train.lora.targets has kv_b_proj, which parallel.cp does not support: leave it out")


@dataclass(frozen=True)
class CorpusConfig(StageConfig):
    """Settings of a run that trains next-token prediction on a corpus."""

    data: DataConfig = field(default_factory=DataConfig)
    """Corpus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.vocab_size != self.model.vocab_size:
            raise ValueError(
                f"data.vocab_size is {self.data.vocab_size}: expected model.vocab_size, {self.model.vocab_size}"
            )


@dataclass(frozen=True)
class PretrainConfig(CorpusConfig):
    """Settings of a pretraining run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init:
            raise ValueError(f"init is {shown(self.init)}: leave it out, pretraining starts with random weights")
        if self.train.lora:
            raise ValueError("train.lora is set: leave it out, pretraining starts with random weights")


@dataclass(frozen=True)
class ExtendConfig(CorpusConfig):
    """Settings of a context extension run."""


def read(name: str, assignments: list[str]) -> dict[str, Any]:
    """Returns a run's settings as plain values.

    `model: NAME`, also in an assignment, is replaced by the content of configs/model/NAME.yaml before the other
    assignments are applied. data.vocab_size defaults to the model's.
    """
    chosen = [each for each in assignments if each.partition("=")[0] == "model"]
    content = override(load_yaml(config_path(name)), chosen)
    model = content.get("model")
    if isinstance(model, str):
        content["model"] = load_yaml(config_path(f"model/{model}.yaml"))
        if isinstance(run := content.get("run", {}), dict):
            content["run"] = {"model_name": f"ictx-{Path(model).name}", **run}
    content = override(content, [each for each in assignments if each not in chosen])
    model = content.get("model")
    if isinstance(model, dict) and "vocab_size" in model and isinstance(content.setdefault("data", {}), dict):
        content["data"].setdefault("vocab_size", model["vocab_size"])
    return content


def load(name: str, assignments: list[str]) -> PretrainConfig:
    """Reads a pretraining run's settings. Raises UserError with the invalid setting."""
    return build(PretrainConfig, read(name, assignments))
