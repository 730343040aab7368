"""Sizes of a model, under the names that DeepSeek-V3's configuration has for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ictx.settings import build, load_yaml


@dataclass(frozen=True)
class YarnConfig:
    """YaRN, which stretches rotary positions beyond the length that a model was trained on (arXiv:2309.00071)."""

    factor: float
    """How many times longer than `original_max_position_embeddings` the context becomes."""
    original_max_position_embeddings: int
    """Longest context before stretching."""
    beta_fast: float = 32.0
    """Dimensions that turn more often than this over the original context stay as they are."""
    beta_slow: float = 1.0
    """Dimensions that turn less often than this are interpolated in full."""
    mscale: float = 1.0
    """Weight of the length in the scale of cosine and sine."""
    mscale_all_dim: float = 1.0
    """Weight of the length in the scale of the softmax."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor is {self.factor}: expected 1 or more")
        if self.original_max_position_embeddings < 1:
            raise ValueError(
                f"original_max_position_embeddings is {self.original_max_position_embeddings}: expected 1 or more"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A dense DeepSeek-V3 model."""

    vocab_size: int
    """Entries of the vocabulary."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the feed-forward layers."""
    num_hidden_layers: int
    """Layers."""
    num_attention_heads: int
    """Attention heads."""
    q_lora_rank: int
    """Rank of the query's low-rank projection."""
    kv_lora_rank: int = 512
    """Width of the latent that the cache holds in place of keys and values."""
    qk_nope_head_dim: int = 128
    """Width of a head's query and key without position."""
    qk_rope_head_dim: int = 64
    """Width of the rotary part of query and key; the key's is shared by all heads."""
    v_head_dim: int = 128
    """Width of a head's value."""
    max_position_embeddings: int = 4096
    """Longest context."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square before its root."""
    initializer_range: float = 0.02
    """Standard deviation of the weights at the start."""
    yarn: YarnConfig | None = None
    """Stretching of positions, or none."""

    def __post_init__(self) -> None:
        for name in [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "max_position_embeddings",
            "rope_theta",
            "rms_norm_eps",
        ]:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected more than 0")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}: expected an even number")
        if self.yarn and self.yarn.factor * self.yarn.original_max_position_embeddings != self.max_position_embeddings:
            raise ValueError(
                f"max_position_embeddings is {self.max_position_embeddings}: expected yarn.factor × "
                f"yarn.original_max_position_embeddings = "
                f"{self.yarn.factor * self.yarn.original_max_position_embeddings:.0f}"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's whole query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """Factor on the scores: qk_head_dim^-½ · m², m = 0.1 · mscale_all_dim · ln(factor) + 1 with YaRN."""
        scale = 1.0 / math.sqrt(self.qk_head_dim)
        if self.yarn and self.yarn.factor > 1:
            m = 0.1 * self.yarn.mscale_all_dim * math.log(self.yarn.factor) + 1.0
            scale *= m * m
        return scale

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Reads a YAML file. Raises UserError naming what is wrong in it."""
        return build(cls, load_yaml(path))
