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
"""What `models:/NAME@ALIAS` can name, and a search in the registry can quote."""
ALIAS = re.compile(r"(?!v\d+$|latest$)[A-Za-z0-9_-]{1,200}", re.IGNORECASE)
"""What MLflow takes: `latest` and `v1` would be read as versions."""


TRAINING_ONLY = {"initializer_range", "mtp_loss_weight", "moe.balance_loss_weight", "moe.bias_update_speed"}
"""Settings of a model that change how it is trained and not what it computes: another start may change them."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, and its learning rate: a linear warm-up, then a decay."""

    name: str = "adamw"
    """`adamw`, or `muon` for the layers' matrices and AdamW for the rest."""
    learning_rate: float = 3e-4
    """Highest learning rate."""
    schedule: str = "cosine"
    """`cosine`: down from the warm-up on; `wsd`: stays until the last `decay_steps`."""
    decay_steps: int | None = None
    """Steps of the decay of `wsd`; a tenth of all unless given."""
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
    """Small matrices that are trained in place of the model's own (arXiv:2106.09685)."""

    rank: int = 16
    """Width of the matrices."""
    alpha: float = 32.0
    """What they add is weighted by alpha / rank."""
    dropout: float = 0.0
    """Share of their inputs that is left out in training."""
    targets: tuple[str, ...] | None = None
    """Names of the layers' matrices that get them, such as q_b_proj and o_proj; all of attention and feed-forward
    unless given."""

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
        """Factor on what the matrices add."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoopConfig:
    """How long, on how much, how often."""

    steps: int
    """Optimizer steps."""
    sequence_length: int
    """Tokens of a window."""
    batch_size: int
    """Windows of a rank in a forward and backward."""
    dtype: str = "bfloat16"
    """Dtype of the computation on GPUs, and of the exported weights; weights are kept in float32 while training."""
    mask_documents: bool = False
    """Keep attention within documents, with positions that begin anew in each; else a window is one text."""
    recompute: str = "selective"
    """What backward computes again instead of keeping it: `none`, `selective` (all but attention's result), `full`;
    `auto`: as little as the GPU's memory allows (`ictx.parallel.memory`), and `selective` without a GPU."""
    recompute_layers: int | None = None
    """Layers that do so, the first ones; all of them unless given."""
    offload: bool = False
    """Keep what `selective` and `full` keep, layers' inputs among it, in the host's memory: for very long windows."""
    fp8: str = "none"
    """Recipe by which the layers' linear products are computed in fp8, where GPU and torchao have it: `tensorwise`,
    `rowwise`, `rowwise_with_gw_hp`; `none`: in `dtype`."""
    compile: bool = False
    """Compile each layer with torch.compile; layers with experts stay as they are."""
    deterministic: bool = False
    """The same bits in each run on a GPU: libraries that are faster, and do not promise that, are not used."""
    accumulate: int = 1
    """Forwards and backwards of a step: `accumulate` times the batch in the same memory."""
    reduce_once: bool = False
    """Sum gradients over ranks once a step, not in each backward: less traffic, but memory for all of them."""
    z_loss: float = 0.0
    """Weight of the mean of log² Z, Z being the sum of a token's exponentiated logits: 1e-4 in PaLM; 0: none."""
    seed: int = 0
    """Weights and order of the data."""
    log_every: int = 10
    """Steps between two records of the loss."""
    validate_every: int = 100
    """Steps between two looks at the validation data."""
    validation_windows: int = 64
    """Windows at each look: the same ones whatever the number of ranks and their batches."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that stay."""
    bad_steps: int = 10
    """Steps in a row that are skipped, their loss or gradient not being finite (or a spike); one more is too many."""
    roll_backs: int = 3
    """Times in a row that the run then goes back to its last checkpoint, without the data between; then it ends."""
    skip_spikes: float = 0.0
    """Skip steps whose loss or gradient is so many standard deviations above those of the last ones; 0: none."""
    timeout: float = 600.0
    """Seconds after which a rank that does not take part in a step ends the job; a little before, it is named."""
    lora: LoraConfig | None = None
    """Train small matrices beside the frozen ones, with a parent (`init`) only."""
    profile: int = 0
    """Steps to trace, after the first ones, to run.dir/profile."""

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
            raise ValueError("offload is true: expected compile: false, and all layers to compute again")
        if self.fp8 != "none" and not (self.compile and self.dtype == "bfloat16"):
            raise ValueError(f"fp8 is {self.fp8!r}: expected compile: true (or casts cost too much), dtype: bfloat16")
        if self.recompute == "auto" and (self.offload or self.recompute_layers is not None):
            raise ValueError("recompute is 'auto': expected offload: false, and no recompute_layers")
        for name in ("bad_steps", "recompute_layers", "roll_backs", "skip_spikes", "profile", "z_loss"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 or more")
        if not 1 <= self.timeout <= LONGEST_TIMEOUT:
            raise ValueError(f"timeout is {self.timeout}: expected 1 to {LONGEST_TIMEOUT:.0f} seconds")


@dataclass(frozen=True)
class RunConfig:
    """Where results go."""

    dir: Path | None = None
    """Checkpoints, metrics and the exported model."""
    start_from: Path | None = None
    """Checkpoint of another run to begin from, such as for a decay of its own: RUN/checkpoints/step-00001000."""
    experiment: str = "pretrain"
    """MLflow experiment."""
    model_name: str | None = None
    """Registered model; `ictx-<name of the model's file>` unless given, nothing is registered if empty."""
    alias: str = "candidate"
    """Alias that the registered version gets."""
    tracking_patience: float = 300.0
    """Seconds for which the beginning and the end of a run wait for a tracking server that does not answer."""

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
    """A run of any stage."""

    model: ModelConfig
    """Sizes of the model."""
    train: LoopConfig
    """The loop."""
    init: str = ""
    """Model to begin with: models:/NAME/VERSION, models:/NAME@ALIAS, or run:/FOLDER for the export of an own run."""
    parallel: Layout = field(default_factory=Layout)
    """Ranks along the axes of the mesh."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    run: RunConfig = field(default_factory=RunConfig)
    """The results."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """The run in MLflow and W&B."""

    def __post_init__(self) -> None:
        if self.train.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"train.sequence_length is {self.train.sequence_length}: expected at most "
                f"model.max_position_embeddings, {self.model.max_position_embeddings}"
            )
        self.parallel.check_model(self.model.num_attention_heads, self.train.sequence_length)
        lora = self.train.lora
        if lora and self.parallel.cp > 1 and "kv_b_proj" in (lora.targets or ("kv_b_proj",)):
            raise ValueError("train.lora.targets has kv_b_proj: expected others, as parallel.cp reads it as one matrix")


@dataclass(frozen=True)
class CorpusConfig(StageConfig):
    """A run that predicts the next token of a corpus."""

    data: DataConfig = field(default_factory=DataConfig)
    """The corpus."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.vocab_size != self.model.vocab_size:
            raise ValueError(
                f"data.vocab_size is {self.data.vocab_size}: expected model.vocab_size, {self.model.vocab_size}"
            )


@dataclass(frozen=True)
class PretrainConfig(CorpusConfig):
    """A pretraining run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init:
            raise ValueError(f"init is {shown(self.init)}: expected none, as pretraining begins with random weights")
        if self.train.lora:
            raise ValueError("train.lora is given: expected none, as pretraining begins with random weights")


@dataclass(frozen=True)
class ExtendConfig(CorpusConfig):
    """A run that teaches a model longer contexts."""


def read(name: str, assignments: list[str]) -> dict[str, Any]:
    """Returns a run's settings as plain values.

    `model: NAME`, also from an assignment, is replaced by the content of configs/model/NAME.yaml; other assignments
    come after that. The corpus gets the model's vocabulary unless it sets another.
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
    """Reads a run's settings. Raises UserError naming what is wrong in them."""
    return build(PretrainConfig, read(name, assignments))
