"""Rotary position embedding over adjacent pairs, with YaRN's frequencies (arXiv:2104.09864, arXiv:2309.00071)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ictx.model.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Returns the angle per position of each pair of dimensions, float32 of shape (qk_rope_head_dim / 2,)."""
    width = config.qk_rope_head_dim
    plain = config.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    yarn = config.yarn
    if yarn is None:
        return plain

    def pair_that_turns(times: float) -> float:
        """The pair that turns this often over the original context (YaRN, section 3.2)."""
        length = yarn.original_max_position_embeddings
        return width * math.log(length / (times * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / yarn.factor * ramp + plain * (1 - ramp)


def attention_factor(config: ModelConfig) -> float:
    """Returns YaRN's factor on cosine and sine: 1 where mscale equals mscale_all_dim."""
    yarn = config.yarn
    if yarn is None or yarn.factor <= 1:
        return 1.0
    of_length = 0.1 * math.log(yarn.factor)
    return (of_length * yarn.mscale + 1.0) / (of_length * yarn.mscale_all_dim + 1.0)


def rotations(config: ModelConfig, positions: Tensor) -> Tensor:
    """Returns the rotation of each pair at each position, complex64 of shape (len(positions), qk_rope_head_dim / 2)."""
    angles = torch.outer(positions.float(), inverse_frequencies(config).to(positions.device))
    return torch.polar(torch.full_like(angles, attention_factor(config)), angles)


def rotate(x_bshd: Tensor, rotations_sd: Tensor) -> Tensor:
    """Turns each adjacent pair of the last dimension by its position's angle; computes in float32, keeps the dtype."""
    pairs = torch.view_as_complex(x_bshd.float().reshape(*x_bshd.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotations_sd[:, None, :]).flatten(-2).to(x_bshd.dtype)
