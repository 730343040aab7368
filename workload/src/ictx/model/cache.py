"""Size of a model's latent cache, and the positions of a forward pass's tokens in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ictx.kernels import layout
from ictx.model.config import ModelConfig

CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes of an unquantised cache."""


def bytes_per_token(config: ModelConfig, dtype: torch.dtype, stored: str | None = None) -> int:
    """Returns the bytes of one token in the caches of all layers, with latents of `dtype` or quantised (`stored`)."""
    row = layout.ROW_BYTES if stored else config.cache_width * dtype.itemsize
    return row * config.num_hidden_layers


def quantisable(config: ModelConfig) -> bool:
    """Whether the model's latents can be quantised: the layout supports one size of latents and keys only."""
    return (config.kv_lora_rank, config.qk_rope_head_dim) == (layout.LATENT, layout.ROPE)


@dataclass(frozen=True)
class Slots:
    """Positions of one forward pass's tokens; the same in every layer."""

    positions_bs: Tensor
    """Position of each token in its sequence, int64; undefined for padding."""
    real_bs: Tensor | None
    """False for padding, bool; None if there is none."""
    lengths_b: Tensor
    """Length of each sequence including these tokens, int64."""
    lengths: list[int]
    """Those lengths on the host, if known."""

    @property
    def longest(self) -> int:
        """The largest of those lengths, at least 1, so that padding has a key to attend to."""
        return max(1, *self.lengths)
