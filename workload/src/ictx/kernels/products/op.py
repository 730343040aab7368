"""The products of a decode step outside attention: fused kernels for one token, PyTorch's products for several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ictx.kernels import dispatch
from ictx.kernels.carveout import prefer_l1
from ictx.kernels.layout import LATENT, ROPE
from ictx.kernels.rope_cache.op import check, mla_rope_cache, row_constants, rows_of, strides_of

OPERATION = "decode_products"
TILE = 8192
"""Weights per program, rounded to whole rows: small enough that many programs per multiprocessor keep memory busy."""
LONGEST = 16384
"""Longest row that the kernels support."""
COLUMNS = 64
"""Columns of the latent that a program of `absorb` computes."""
WARPS = 4
PROGRAMS = {4: 816, 8: 512}
"""Number of programs, by warps per program, when each takes several rows: a few per multiprocessor (Hopper has 132), so
that all are resident and the next launch has room. Tuned on an H200 for gated rows of 2,048 and rows of 5,632."""


@dataclass(frozen=True)
class NewRow:
    """The arguments of `mla_rope_cache` for new tokens, except their angles."""

    x: Tensor
    gain: Tensor
    slots: Tensor
    cache: Tensor
    eps: float
    stored: str | None


def _choice(x: Tensor, width: int) -> str:
    """Returns the name of the implementation for vectors `x` [tokens, …]."""
    shape = None
    if x.shape[0] != 1:
        shape = f"{x.shape[0]} tokens: the kernel supports one"
    elif width > LONGEST:
        shape = f"rows of {width}: the kernel supports at most {LONGEST}"
    return dispatch.choose(OPERATION, x.device, x.dtype, shape=shape).name


def _options(device: torch.device, warps: int = WARPS) -> dict[str, Any]:
    """Returns the options of a launch."""
    return {"num_warps": warps, **dispatch.launch_options(dispatch.launches_early(device))}


def constants(rows: int, width: int, gated: bool) -> tuple[dict[str, int], int]:
    """Returns the compile-time parameters of `project` for `rows` of `width` weights, and the warps per program.

    A program takes gated or long rows in turn, half a tile at a time, and loads the next ones meanwhile.
    """
    padded = 1 << (width - 1).bit_length()
    long = 2 * padded > TILE
    warps, count = (2 * WARPS if long else WARPS), 1
    block = max(TILE // padded // (2 if gated else 1), 1)
    if (gated or long) and padded <= TILE:
        block = max(block // 2, 1)
        count = -(-rows // (block * PROGRAMS[warps]))
    return {"WIDTH": width, "PADDED": padded, "BLOCK": block, "COUNT": count}, warps


def project(
    x: Tensor,
    weight: Tensor,
    *,
    gain: Tensor | None = None,
    eps: float = 0.0,
    up: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Returns weight · x of each token, [tokens, rows] in x's dtype.

    Args:
        x: [tokens, width].
        weight: [rows, width] in x's dtype, its rows contiguous.
        gain: weight of an RMSNorm before the product, [width]; None: no norm.
        eps: epsilon of that norm.
        up: a second weight of the same shape: the result is silu(weight · x) · (up · x).
        residual: [tokens, rows], added to the result.
    """
    if _choice(x, x.shape[1]) == "torch":
        if gain is not None:
            x = F.rms_norm(x, gain.shape, gain, eps)
        out = F.linear(x, weight)
        out = F.silu(out) * F.linear(x, up) if up is not None else out
        return out + residual if residual is not None else out
    from ictx.kernels.products import triton as kernels

    rows, width = weight.shape
    out = torch.empty(1, rows, dtype=x.dtype, device=x.device)
    fixed, warps = constants(rows, width, up is not None)
    grid = (-(-rows // (fixed["BLOCK"] * fixed["COUNT"])), 1)
    launched = kernels.project[grid](
        x, gain if gain is not None else x, weight, up if up is not None else weight,
        residual if residual is not None else x, out, eps, rows, 0, 0, weight.stride(0), 0,
        NORM=gain is not None, GATED=up is not None, ADD=residual is not None, **fixed,
        **_options(x.device, warps),
    )  # fmt: skip
    prefer_l1(launched)
    return out


def absorb(q: Tensor, w_kv: Tensor, cos: Tensor, sin: Tensor, new: NewRow) -> Tensor:
    """Returns absorbed queries [tokens, 1, heads, 576] for `mla_decode`, and writes the tokens' rows of the cache.

    Args:
        q: [tokens, heads, nope + 64], before the rotation, contiguous.
        w_kv: [heads, nope + value, 512] in q's dtype: keys' part first.
        cos: cosines of each pair's angle, float32 [tokens, 32], YaRN's factor included.
        sin: sines, likewise.
        new: values of the same tokens for the cache.
    """
    _, heads, width = q.shape
    nope = width - ROPE
    check(new.x, new.gain, cos, sin, new.slots, new.cache, new.stored)
    if _choice(q, width) == "torch":
        mla_rope_cache(new.x, new.gain, cos, sin, new.slots, new.cache, new.eps, new.stored)
        even, odd = q[..., nope::2].float(), q[..., nope + 1 :: 2].float()
        cos, sin = cos[:, None], sin[:, None]
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(q.dtype)
        latent = torch.einsum("thn,hnc->thc", q[..., :nope], w_kv[:, :nope])
        return torch.cat([latent, rotated], -1)[:, None]
    from ictx.kernels.products import triton as kernels

    out = torch.empty(1, 1, heads, LATENT + ROPE, dtype=q.dtype, device=q.device)
    launched = kernels.absorb[(heads * (LATENT // COLUMNS) + 1,)](
        q, w_kv, cos, sin, out, w_kv.stride(0), heads, new.x, new.gain, new.slots,
        *rows_of(new.cache, q.dtype, new.stored), new.eps, new.x.stride(0), *strides_of(new.cache),
        NOPE=nope, PADDED=1 << (nope - 1).bit_length(), COLUMNS=COLUMNS,
        **row_constants(new.stored), **_options(q.device),
    )  # fmt: skip
    prefer_l1(launched)
    return out


def expand(out: Tensor, w_kv: Tensor, value: int) -> Tensor:
    """Returns each head's values [tokens, heads · value], expanded from the attended latents of `mla_decode`.

    Args:
        out: [tokens, 1, heads, 512].
        w_kv: [heads, nope + value, 512] in out's dtype: values' part last.
    """
    heads = out.shape[2]
    weight = w_kv[:, -value:]
    if _choice(out, LATENT) == "torch":
        return torch.einsum("thc,hvc->thv", out[:, 0], weight).flatten(1)
    from ictx.kernels.products import triton as kernels

    result = torch.empty(1, heads * value, dtype=out.dtype, device=out.device)
    fixed, warps = constants(value, LATENT, False)
    launched = kernels.project[(-(-value // fixed["BLOCK"]), heads)](
        out, out, weight, weight, out, result, 0.0, value, LATENT, weight.stride(0), weight.stride(1), value,
        NORM=False, GATED=False, ADD=False, **fixed, **_options(out.device, warps),
    )  # fmt: skip
    prefer_l1(launched)
    return result
