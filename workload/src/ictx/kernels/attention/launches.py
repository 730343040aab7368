"""Launches of the attention kernels, and the preparation of their inputs."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ictx.kernels import dispatch, turing
from ictx.kernels.attention.tuning import AttentionConfig, Tiles


def widths(columns: int) -> tuple[int, int]:
    """Returns two powers of 2, the second at most half of the first or 0, whose sum holds that many columns."""
    whole = max(16, 1 << (columns.bit_length() - 1))
    rest = columns - whole
    second = 0 if rest <= 0 else max(16, 1 << (rest - 1).bit_length())
    return (whole, second) if second < whole else (2 * whole, 0)


def readable(x: Tensor) -> Tensor:
    """Returns x [tokens, heads, columns], copied if the kernels do not support its strides or alignment."""
    aligned = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:2])
    return x if x.stride(2) == 1 and aligned and x.data_ptr() % 16 == 0 else x.contiguous()


def source(x: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """Returns a pointer or tensor descriptor for tiles of x [tokens, heads, width]; head h is at column h · stride."""
    if not tma:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape = [x.shape[0], (x.shape[1] - 1) * x.stride(1) + x.shape[2]]
    return TensorDescriptor(x, shape, [x.stride(0), 1], [rows, columns])


def constants(d0: int, d1: int, dv: int, tiles: Tiles, documents: bool) -> dict[str, Any]:
    """Returns the compile-time parameters and options that all kernels share."""
    return {
        "D0": d0, "D1": d1, "DV": dv, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "DOCUMENTS": documents,
        "TMA": tiles.tma, "STAGES": tiles.stages, "num_warps": tiles.warps,
    }  # fmt: skip


def forward(
    q: Tensor, k: tuple[Tensor, Tensor], v: Tensor, scale: float, first: Tensor | None, tiles: Tiles,
    out: Tensor, lse: Tensor, shift: int = 0, carry: bool = False,
) -> None:  # fmt: skip
    """Launches the forward kernel, which writes `out` and `lse`.

    Args:
        k: the keys' columns in two parts, [tokens, heads, …] each; a part may be one head, expanded.
        shift: position of the first query among the keys.
        carry: whether `out` (float32) and `lse` hold the result over earlier keys, which the kernel continues.
    """
    from ictx.kernels.attention import triton as kernels

    rows, heads, _ = q.shape
    (d0, d1), dv = widths(q.shape[-1]), v.shape[-1]
    blocks = -(-rows // tiles.block_m)
    q_1 = q[..., d0:] if d1 else q
    k_0, k_1 = k
    with turing.tensor_cores(dispatch.capability(q.device)):
        kernels.forward[(blocks * heads,)](
            source(q, tiles.block_m, d0, tiles.tma), source(q_1, tiles.block_m, d1 or d0, tiles.tma),
            source(k_0, tiles.block_n, d0, tiles.tma), source(k_1, tiles.block_n, d1 or d0, tiles.tma),
            source(v, tiles.block_n, dv, tiles.tma), out, lse, lse if first is None else first,
            *q.stride()[:2], *k_0.stride()[:2], *k_1.stride()[:2], *v.stride()[:2],
            rows, k_0.shape[0], shift, heads, blocks, scale * math.log2(math.e),
            CARRY=carry, AHEAD=tiles.ahead, **constants(d0, d1, dv, tiles, first is not None),
        )  # fmt: skip


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, first: Tensor | None,
    end: Tensor | None, config: AttentionConfig,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of q, k and v, contiguous."""
    from ictx.kernels.attention import backward_triton as kernels

    rows, heads, _ = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not rows:
        return dq, dk, dv
    # Padded to whole tiles, so that the kernels read them without masks.
    padded = -(-rows // 256) * 256
    sums = torch.empty(2, heads, padded, dtype=torch.float32, device=q.device)
    (d0, d1), value = widths(q.shape[-1]), v.shape[-1]
    kernels.row_sums[(padded // 64, heads)](
        out, grad, lse, sums, grad.stride(0), grad.stride(1), rows, padded, heads, DV=value, ROWS=64
    )
    documents = first is not None
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad.stride()[:2])

    def sources(tiles: Tiles) -> list[Any]:
        take = functools.partial(source, tma=tiles.tma)
        split = [(x, x[..., d0:] if d1 else x) for x in (q, k)]
        return [
            *(take(x, tiles.block_m, n) for x, n in zip(split[0], (d0, d1 or d0), strict=True)),
            *(take(x, tiles.block_n, n) for x, n in zip(split[1], (d0, d1 or d0), strict=True)),
            take(v, tiles.block_n, value), take(grad, tiles.block_m, value),
        ]  # fmt: skip

    with turing.tensor_cores(dispatch.capability(q.device)):
        tiles = config.keys_values
        blocks = -(-rows // tiles.block_n)
        kernels.keys_values[(blocks * heads,)](
            *sources(tiles), dk, dv, sums, lse if end is None else end, *strides,
            rows, padded, heads, blocks, scale, scale * math.log2(math.e),
            **constants(d0, d1, value, tiles, documents),
        )  # fmt: skip
        tiles = config.queries
        blocks = -(-rows // tiles.block_m)
        kernels.queries[(blocks * heads,)](
            *sources(tiles), dq, sums, lse if first is None else first, *strides,
            rows, padded, heads, blocks, scale, scale * math.log2(math.e),
            **constants(d0, d1, value, tiles, documents),
        )  # fmt: skip
    return dq, dk, dv
