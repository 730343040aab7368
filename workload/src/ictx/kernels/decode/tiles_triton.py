"""Addresses of the tiles that `mla_decode` reads and writes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_at(first, start, at, WIDTH: tl.constexpr, columns):
    """Pointers to `columns` of rows `at`, WIDTH apart, relative to `start` (one per tile or one per row)."""
    if len(start.shape) == 0:
        return first + start + (at[:, None] * WIDTH + columns[None, :])
    else:
        return first + (start + at * WIDTH)[:, None] + columns[None, :]


@triton.jit
def put(target, acc, factor, row_ok, LATENT: tl.constexpr):
    """Stores acc * factor as rows with a stride of LATENT elements."""
    at = tl.arange(0, acc.shape[0])[:, None] * LATENT + tl.arange(0, acc.shape[1])[None, :]
    tl.store(target + at, (acc * factor[:, None]).to(target.dtype.element_ty), row_ok[:, None])


@triton.jit
def put_group(target, low, high, factor, row_ok, LATENT: tl.constexpr):
    """Stores one group's even and odd columns, interleaved."""
    put(target, tl.interleave(low, high), factor, row_ok, LATENT)
