"""Rotary position embedding over adjacent pairs, with YaRN's frequencies (arXiv:2104.09864, arXiv:2309.00071)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ictx.model.config import ModelConfig


class Rotations(NamedTuple):
    """Cosine and sine of each pair's angle, float32 of shape (batch or 1, sequence, 1, qk_rope_head_dim / 2)."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Returns the angle per position of each pair of dimensions, float32 of shape (qk_rope_head_dim / 2,)."""
    width = config.qk_rope_head_dim
    wavelengths = config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    yarn = config.yarn
    if yarn is None:
        return 1.0 / wavelengths

    def pair_rotating(times: float) -> float:
        """The pair that makes this many rotations over the original context (YaRN, section 3.2)."""
        length = yarn.original_max_position_embeddings
        return width * math.log(length / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_rotating(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_rotating(yarn.beta_slow)), width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float32, device=device)
    ramp = ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)
    return 1.0 / (yarn.factor * wavelengths) * ramp + 1.0 / wavelengths * (1 - ramp)


def attention_factor(config: ModelConfig) -> float:
    """Returns YaRN's factor on cosine and sine: 1 if mscale equals mscale_all_dim."""
    yarn = config.yarn
    if yarn is None or yarn.factor <= 1:
        return 1.0
    of_length = 0.1 * math.log(yarn.factor)
    return (of_length * yarn.mscale + 1.0) / (of_length * yarn.mscale_all_dim + 1.0)


def rotations(config: ModelConfig, position_ids: Tensor) -> Rotations:
    """Returns the rotations at positions of shape (batch or 1, sequence).

    Angles are float32 products, as in other implementations: at a million positions their rounding affects results.
    """
    angles = position_ids[:, :, None, None].float() * inverse_frequencies(config, position_ids.device)
    factor = attention_factor(config)
    return Rotations(angles.cos() * factor, angles.sin() * factor)


def rotate(x_bshd: Tensor, rope: Rotations) -> Tensor:
    """Rotates adjacent pairs of the last dimension by their angle; computes in float32, returns the input's dtype."""
    even, odd = x_bshd.float().view(*x_bshd.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack([even * rope.cos - odd * rope.sin, even * rope.sin + odd * rope.cos], -1)
    return rotated.flatten(-2).to(x_bshd.dtype)
