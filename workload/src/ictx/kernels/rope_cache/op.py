"""`mla_rope_cache`: computes new tokens' rows of the cache from their projection, in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ictx.kernels import dispatch, layout
from ictx.kernels.layout import GROUP, LATENT, ROPE, ROW, ROW_BYTES
from ictx.kernels.rope_cache import reference

WARPS = 4
"""Warps per program: 512 values, four per thread."""


def mla_rope_cache(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    cache: Tensor,
    eps: float = 1e-6,
    stored: str | None = None,
) -> None:
    """Normalises the latents (RMSNorm), rotates the keys' adjacent pairs, and writes both to the cache.

    Computes in float32 and rounds once: to the cache's dtype, or to int8 or fp8 with one scale per 128 values.
    (arXiv:2405.04434, section 2.1, for the cached values; arXiv:2104.09864, equation 34, for the rotation.)

    Args:
        x: the projection's output, [tokens, 576] in float16 or bfloat16 (float32 and float64 in PyTorch only): latents
            before the norm, then keys before the rotation.
        weight: weight of the norm, [512].
        cos: cosines of each pair's angle, float32 [tokens, 32], YaRN's factor included.
        sin: sines, likewise.
        slots: slot of each token in the cache, int64 [tokens]: block × block_size + row. Tokens with a negative slot
            are skipped.
        cache: [blocks, block_size, 576] in x's dtype, or uint8 [blocks, block_size, 656] (see `layout`); written to.
        eps: added to the mean square.
        stored: dtype of a quantised latent, int8 or fp8.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    check(x, weight, cos, sin, slots, cache, stored)
    if dispatch.choose("mla_rope_cache", x.device, x.dtype, stored=stored).name == "torch":
        reference.mla_rope_cache(x, weight, cos, sin, slots, cache, eps, stored)
    elif x.shape[0]:
        _launch(x, weight, cos, sin, slots, cache, eps, stored)


def check(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor, stored: str | None
) -> None:
    """Raises ValueError for inputs that the kernel does not support."""
    if x.dim() != 2 or x.shape[1] != ROW or x.stride(1) != 1:
        raise ValueError(f"x is {list(x.shape)}: expected [tokens, {ROW}], its rows contiguous")
    if weight.shape != (LATENT,):
        raise ValueError(f"weight is {list(weight.shape)}: expected [{LATENT}]")
    for name, value in (("cos", cos), ("sin", sin)):
        if value.shape != (x.shape[0], ROPE // 2) or value.dtype != torch.float32 or not value.is_contiguous():
            raise ValueError(
                f"{name} is {list(value.shape)} {value.dtype}: expected [{x.shape[0]}, {ROPE // 2}] float32"
            )
    if slots.shape != (x.shape[0],) or slots.dtype != torch.int64:
        raise ValueError(f"slots is {list(slots.shape)} {slots.dtype}: expected [{x.shape[0]}] int64")
    layout.check(cache, x.dtype, stored)


def row_constants(stored: str | None) -> dict[str, Any]:
    """Returns the compile-time parameters of kernels that write rows of the cache."""
    return {
        "LATENT": LATENT,
        "ROPE": ROPE,
        "GROUP": GROUP,
        "ROW": ROW,
        "ROW_BYTES": ROW_BYTES,
        "STORED": stored or "plain",
    }


def rows_of(cache: Tensor, dtype: torch.dtype, stored: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns three flat views of the cache's bytes: as latents, as scales and as keys."""
    flat = layout.flat(cache)
    return (flat, flat.view(torch.float32), flat.view(dtype)) if stored else (flat, flat, flat)


def strides_of(cache: Tensor) -> tuple[int, int]:
    """Returns the block stride in rows, and the block size."""
    return cache.stride(0) // cache.stride(1), cache.shape[1]


def _launch(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, cache: Tensor, eps: float, stored: str | None
) -> None:
    """Runs the Triton kernel."""
    from ictx.kernels.rope_cache import triton as kernels

    kernels.rope_cache[(x.shape[0],)](
        x, weight, cos, sin, slots, *rows_of(cache, x.dtype, stored), eps, x.stride(0), *strides_of(cache),
        num_warps=WARPS, **row_constants(stored), **dispatch.launch_options(dispatch.launches_early(x.device)),
    )  # fmt: skip
