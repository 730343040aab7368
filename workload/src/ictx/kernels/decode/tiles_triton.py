"""Where the tiles of `mla_decode` are read and written."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_at(first, start, at, WIDTH: tl.constexpr, columns):
    """Pointers to `columns` of rows `at`, WIDTH apart, from `start` (one for the tile, or one for each row) on."""
    if len(start.shape) == 0:
        return first + start + (at[:, None] * WIDTH + columns[None, :])
    else:
        return first + (start + at * WIDTH)[:, None] + columns[None, :]


@triton.jit
def put(target, acc, factor, row_ok, LATENT: tl.constexpr):
    """Stores acc * factor as rows that lie LATENT elements apart."""
    at = tl.arange(0, acc.shape[0])[:, None] * LATENT + tl.arange(0, acc.shape[1])[None, :]
    tl.store(target + at, (acc * factor[:, None]).to(target.dtype.element_ty), row_ok[:, None])


@triton.jit
def put_group(target, low, high, factor, row_ok, LATENT: tl.constexpr):
    """Stores one group's columns in their order."""
    put(target, tl.interleave(low, high), factor, row_ok, LATENT)
