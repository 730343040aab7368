"""What a model's latent cache takes, and where the tokens of a forward go in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ictx.kernels import layout
from ictx.model.config import ModelConfig

CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a cache may hold its values in."""


def bytes_per_token(config: ModelConfig, dtype: torch.dtype, stored: str | None = None) -> int:
    """Returns what one token takes in the caches of all layers, with latents of `dtype` or quantised."""
    row = layout.ROW_BYTES if stored else config.cache_width * dtype.itemsize
    return row * config.num_hidden_layers


def quantisable(config: ModelConfig) -> bool:
    """Whether the model's latents can be quantised: they and its keys have the one size that there is a layout for."""
    return (config.kv_lora_rank, config.qk_rope_head_dim) == (layout.LATENT, layout.ROPE)


@dataclass(frozen=True)
class Slots:
    """Where the tokens of one forward go; the same in every layer."""

    positions_bs: Tensor
    """Place of each token in its sequence, int64; what padding has here means nothing."""
    real_bs: Tensor | None
    """Which tokens are no padding, bool; None when all are."""
    lengths_b: Tensor
    """Tokens of each sequence once these are in, int64."""
    lengths: list[int]
    """Those lengths, where the host has them."""

    @property
    def longest(self) -> int:
        """The largest of those lengths, at least 1: padding attends to something too."""
        return max(1, *self.lengths)
