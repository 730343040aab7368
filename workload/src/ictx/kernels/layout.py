"""Sizes and the layout of the latent cache.

A cached token is one row: the normed latent (512 values), then the rotated key that all heads share (64 values). A
layer's cache is one tensor [blocks, block_size, row]; a block table [batch, max_blocks] (int32) lists the blocks of
each sequence, and without a table block b belongs to sequence b. Rows of the quantised caches are bytes: 512 of the
latent as int8 or fp8 (e4m3), four float32 scales (one per 128 values), and 64 16-bit values of the key, which stays
as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

LATENT = 512
ROPE = 64
ROW = LATENT + ROPE
GROUP = 128
GROUPS = LATENT // GROUP
SCALE_AT = LATENT
ROPE_AT = SCALE_AT + 4 * GROUPS
ROW_BYTES = ROPE_AT + 2 * ROPE
QK_DIM = 192
V_DIM = 128

QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What the latent of a quantised cache is stored as."""
LARGEST = {"int8": 127.0, "fp8": 448.0}
"""What a group's largest magnitude is scaled to."""


def parts(cache: Tensor, stored: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns views of a quantised cache (uint8 [..., 656]): latent [..., 512], scales [..., 4], key [..., 64]."""
    return (
        cache[..., :SCALE_AT].view(QUANTISED[stored]),
        cache[..., SCALE_AT:ROPE_AT].view(torch.float32),
        cache[..., ROPE_AT:].view(dtype),
    )


def quantise(rows: Tensor, stored: str) -> Tensor:
    """Returns rows [..., 576] as bytes [..., 656]."""
    out = torch.empty(*rows.shape[:-1], ROW_BYTES, dtype=torch.uint8, device=rows.device)
    latent, scales, rope = parts(out, stored, rows.dtype)
    groups = rows[..., :LATENT].float().unflatten(-1, (GROUPS, GROUP))
    scale = groups.abs().amax(-1) / LARGEST[stored]
    scaled = (groups / torch.where(scale == 0, 1.0, scale)[..., None]).flatten(-2)
    latent.copy_(scaled.round() if stored == "int8" else scaled)
    scales.copy_(scale)
    rope.copy_(rows[..., LATENT:])
    return out


def dequantise(rows: Tensor, stored: str, dtype: torch.dtype) -> Tensor:
    """Returns bytes [..., 656] as float32 rows [..., 576]; `dtype` is that of the key part."""
    latent, scales, rope = parts(rows, stored, dtype)
    values = latent.float().unflatten(-1, (GROUPS, GROUP)) * scales[..., None]
    return torch.cat([values.flatten(-2), rope.float()], -1)
