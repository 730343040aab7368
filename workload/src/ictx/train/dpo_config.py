"""Settings of preference optimization."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ictx.data.chat.config import ChatDataConfig
from ictx.train.config import StageConfig

LONGEST_OF_TRL = 32768
"""Tokens of an answer with its prompt up to which `engine: auto` takes TRL."""


@dataclass(frozen=True)
class PreferenceConfig:
    """The loss of a pair of answers, and the model that it compares with."""

    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """`sigmoid`: DPO (arXiv:2305.18290); `ipo` (arXiv:2310.12036), of means over an answer's tokens; `hinge` (SLiC,
    arXiv:2305.10425)."""
    beta: float = 0.1
    """How strongly the model is held to the reference; of `ipo` the paper's τ."""
    reference: str | None = None
    """The model that rewards are relative to, given as `init` is; that one unless given."""
    engine: Literal["auto", "trl", "ictx"] = "auto"
    """`trl`: TRL's DPOTrainer on transformers' model; `ictx`: our own loop, which also shares long answers out among
    ranks; `auto`: TRL where it supports the settings."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}: expected more than 0")


@dataclass(frozen=True)
class DpoConfig(StageConfig):
    """A run of preference optimization. `train.sequence_length` is the most tokens of a prompt with an answer: longer
    answers are cut; `train.batch_size` counts pairs."""

    dpo: PreferenceConfig = field(default_factory=PreferenceConfig)
    """The loss."""
    data: ChatDataConfig = field(default_factory=lambda: ChatDataConfig("dpo"))
    """Prompts with a chosen and a rejected answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # What is counted, and what is added, are those of next-token prediction.
        for name, wrong in {"recompute": "auto", "z_loss": self.train.z_loss or None}.items():
            if getattr(self.train, name) == wrong:
                raise ValueError(f"train.{name} is {wrong}: not for preference optimization, leave it out")
        if self.data.kind != "dpo":
            raise ValueError(f"data.kind is {self.data.kind}: expected dpo")
        if self.dpo.engine == "trl" and (obstacle := self.obstacle()):
            raise ValueError(f"dpo.engine is trl, which cannot do {obstacle}: leave dpo.engine out, or set it to ictx")

    @property
    def engine(self) -> Literal["trl", "ictx"]:
        """What trains."""
        if self.dpo.engine != "auto":
            return self.dpo.engine
        return "ictx" if self.obstacle() or self.train.sequence_length > LONGEST_OF_TRL else "trl"

    def obstacle(self) -> str | None:
        """Returns the setting that TRL's trainer, as we use it, does not support."""
        loop, defaults = self.train, type(self.train)(1, 1, 1)
        unknown = (
            "recompute_layers", "offload", "compile", "fp8", "mask_documents", "reduce_once", "profile", "skip_spikes",
        )  # fmt: skip
        for name in unknown:
            if getattr(loop, name) != getattr(defaults, name):
                return f"train.{name}: {getattr(loop, name)}"
        for axis in ("cp", "dp_replicate"):
            if getattr(self.parallel, axis) != 1:
                return f"parallel.{axis}: {getattr(self.parallel, axis)}"
        if self.run.start_from:
            return f"run.start_from: {self.run.start_from}"
        if self.optimizer.name != "adamw":
            return f"optimizer.name: {self.optimizer.name}"
        return "a model with experts" if self.model.moe else None
