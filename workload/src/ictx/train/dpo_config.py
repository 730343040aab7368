"""Settings of preference optimization."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ictx.data.chat.config import ChatDataConfig
from ictx.train.config import StageConfig

LONGEST_OF_TRL = 32768
"""Maximum tokens of prompt and answer for which `engine: auto` uses TRL."""


@dataclass(frozen=True)
class PreferenceConfig:
    """The loss of a pair of answers, and the reference model."""

    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """`sigmoid`: DPO (arXiv:2305.18290); `ipo` (arXiv:2310.12036), with means over an answer's tokens; `hinge` (SLiC,
    arXiv:2305.10425)."""
    beta: float = 0.1
    """Strength of the regularization towards the reference model; τ of the paper for `ipo`."""
    reference: str | None = None
    """Reference model, in the format of `init`; default: `init`."""
    engine: Literal["auto", "trl", "ictx"] = "auto"
    """`trl`: TRL's DPOTrainer with transformers' model; `ictx`: ictx's own loop, which supports context parallelism;
    `auto`: TRL if it supports the settings and the length, else `ictx`."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta is {self.beta}: expected more than 0")


@dataclass(frozen=True)
class DpoConfig(StageConfig):
    """Settings of preference optimization. `train.sequence_length` is the maximum of tokens of prompt and answer:
    longer answers are truncated; `train.batch_size` counts pairs."""

    dpo: PreferenceConfig = field(default_factory=PreferenceConfig)
    """The loss."""
    data: ChatDataConfig = field(default_factory=lambda: ChatDataConfig("dpo"))
    """Prompts with a chosen and a rejected answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # The memory estimate and the z-loss are implemented only for next-token prediction.
        for name, wrong in {"recompute": "auto", "z_loss": self.train.z_loss or None}.items():
            if getattr(self.train, name) == wrong:
                raise ValueError(f"train.{name} is {wrong}: not supported by preference optimization, leave it out")
        if self.data.kind != "dpo":
            raise ValueError(f"data.kind is {self.data.kind}: expected dpo")
        if self.dpo.engine == "trl" and (obstacle := self.obstacle()):
            raise ValueError(
                f"dpo.engine is trl, which does not support {obstacle}: leave dpo.engine out, or set it to ictx"
            )

    @property
    def engine(self) -> Literal["trl", "ictx"]:
        """The engine that trains."""
        if self.dpo.engine != "auto":
            return self.dpo.engine
        return "ictx" if self.obstacle() or self.train.sequence_length > LONGEST_OF_TRL else "trl"

    def obstacle(self) -> str | None:
        """Returns the first setting that our use of TRL's trainer does not support; None if all are supported."""
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
