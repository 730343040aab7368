"""Sizes and the layout of the latent cache.

A cached token is one row: the normed latent (512 values), then the rotated key that all heads share (64 values). A
layer's cache is one tensor [blocks, block_size, row]; a block table [batch, max_blocks] (int32) lists the blocks of
each sequence. Without a table, block b belongs to sequence b.

A quantised cache is uint8, 656 bytes per token: 512 bytes of latent as int8 (with 128 added) or fp8 (e4m3), four
float32 scales (one per 128 values), and 64 16-bit values of the key, which is not quantised. A block stores the
latents of all tokens, then the scales (those of group 0, those of group 1, and so on), then the keys: 656 is not a
multiple of 32, and rows of that size cost 1.5 times as many memory transactions (measured with hardware counters).
"""

from __future__ import annotations

import torch
from torch import Tensor

LATENT = 512
ROPE = 64
ROW = LATENT + ROPE
GROUP = 128
GROUPS = LATENT // GROUP
ROW_BYTES = LATENT + 4 * GROUPS + 2 * ROPE
QK_DIM = 192
V_DIM = 128

QUANTISED = {"int8": torch.uint8, "fp8": torch.float8_e4m3fn}
"""Storage dtype of the latent in a quantised cache."""
LARGEST = {"int8": 127.0, "fp8": 448.0}
"""Value that a group's largest magnitude is scaled to."""
OFFSET = 128
"""Added to an int8 before it is stored as unsigned, so that a byte converts to a 16-bit number in two instructions."""


def parts(cache: Tensor, stored: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns views of a quantised cache (uint8 [blocks, block_size, 656], the blocks contiguous).

    Latents [blocks, block_size, 512], scales [blocks, block_size, 4], keys [blocks, block_size, 64] of `dtype`.
    """
    blocks, size, _ = cache.shape
    flat = cache.as_strided((blocks, size * ROW_BYTES), (cache.stride(0), 1))
    scales_at, keys_at = size * LATENT, size * (LATENT + 4 * GROUPS)
    return (
        flat[:, :scales_at].view(QUANTISED[stored]).view(blocks, size, LATENT),
        flat[:, scales_at:keys_at].view(torch.float32).view(blocks, GROUPS, size).mT,
        flat[:, keys_at:].view(dtype).view(blocks, size, ROPE),
    )


def check(cache: Tensor, dtype: torch.dtype, stored: str | None) -> None:
    """Raises ValueError if the kernels cannot read a cache; `dtype` is that of values that are not quantised."""
    row, dtype = (ROW_BYTES, torch.uint8) if stored else (ROW, dtype)
    if cache.dim() != 3 or cache.shape[-1] != row or cache.dtype != dtype:
        raise ValueError(f"cache is {list(cache.shape)} {cache.dtype}: expected [blocks, block_size, {row}] {dtype}")
    if cache.stride(2) != 1 or cache.stride(1) != row or cache.stride(0) % row:
        raise ValueError("cache has rows that are not contiguous, or a block stride that is not a multiple of the row")
    if cache.data_ptr() % 16:
        raise ValueError("cache is not aligned to 16 bytes")


def flat(cache: Tensor) -> Tensor:
    """Returns a cache's storage from its first row on, 1-D; bytes are truncated to a multiple of 4 (float32)."""
    count = cache.untyped_storage().nbytes() // cache.element_size() - cache.storage_offset()
    return cache.as_strided((count // 4 * 4 if cache.dtype == torch.uint8 else count,), (1,))


def quantise_groups(latent: Tensor, stored: str) -> tuple[Tensor, Tensor]:
    """Returns latents [..., 512] in their storage dtype, and their scales, float32 [..., 4]."""
    groups = latent.float().reshape(*latent.shape[:-1], GROUPS, GROUP)
    scale = groups.abs().amax(-1) / LARGEST[stored]
    scaled = (groups / torch.where(scale == 0, 1.0, scale)[..., None]).flatten(-2)
    return (scaled.round() + OFFSET if stored == "int8" else scaled).to(QUANTISED[stored]), scale


def quantise(cache: Tensor, stored: str) -> Tensor:
    """Returns a cache [blocks, block_size, 576] as bytes [blocks, block_size, 656]."""
    out = torch.empty(*cache.shape[:2], ROW_BYTES, dtype=torch.uint8, device=cache.device)
    latent, scales, keys = parts(out, stored, cache.dtype)
    values, scale = quantise_groups(cache[..., :LATENT], stored)
    latent.copy_(values)
    scales.copy_(scale)
    keys.copy_(cache[..., LATENT:])
    return out


def dequantise(cache: Tensor, stored: str, dtype: torch.dtype) -> Tensor:
    """Returns bytes [blocks, block_size, 656] as float32 [blocks, block_size, 576]; `dtype` is that of the keys."""
    latent, scales, keys = parts(cache, stored, dtype)
    values = latent.float() - OFFSET if stored == "int8" else latent.float()
    values = (values.reshape(*latent.shape[:-1], GROUPS, GROUP) * scales[..., None]).flatten(-2)
    return torch.cat([values, keys.float()], -1)


def rows_of(
    cache: Tensor, table: Tensor | None, first: int, end: int, stored: str | None, dtype: torch.dtype
) -> Tensor:
    """Returns cached rows [end - first, 576] in `dtype`: a view if they are contiguous and not quantised."""
    if table is None:
        return dequantise(cache[:1], stored, dtype)[0, first:end].to(dtype) if stored else cache[0, first:end]
    size = cache.shape[1]
    begin = first // size
    blocks = cache[table[begin : -(-end // size)].long()]
    if stored:
        blocks = dequantise(blocks, stored, dtype).to(dtype)
    return blocks.flatten(0, 1)[first - begin * size : end - begin * size]
