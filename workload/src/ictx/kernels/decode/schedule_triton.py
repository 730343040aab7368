"""Assignment of tiles to programs: equal runs of the whole batch's tiles, in order."""

from __future__ import annotations

import triton
import triton.language as tl

LONG = tl.constexpr(32)
"""Minimum length of a long run, in tiles."""


@triton.jit
def joint_runs(total, programs):
    """Tiles per program, and how many of the first programs hold one more, chosen to join fewer partial results.

    Short runs are rounded up to the same length, so that the last programs may have no tiles; the slowest program has
    the same work as with an even distribution. Long runs are distributed evenly: using every program saves more time
    than joining fewer results.
    """
    quota = total // programs
    rest = total - quota * programs
    if quota < LONG:
        quota += tl.minimum(rest, 1)
        rest = 0
    return quota, rest


@triton.jit
def first_of(program, quota, rest):
    """The first tile of a program: the first `rest` programs hold one tile more than `quota`."""
    return program * quota + tl.minimum(program, rest)


@triton.jit
def owner_of(tile, quota, rest):
    """The program that holds a tile."""
    long = rest * (quota + 1)
    return tl.where(tile < long, tile // (quota + 1), rest + (tile - long) // tl.maximum(quota, 1))


@triton.jit
def sequence_tiles(lens_ptr, index, batch, row_blocks, BLOCK_N: tl.constexpr):
    """Tiles of each sequence, summed over row blocks. An empty sequence has one, so that its output is written."""
    length = tl.load(lens_ptr + index, index < batch, other=0)
    tiles = tl.maximum((length + BLOCK_N - 1) // BLOCK_N, 1) * row_blocks
    return tl.where(index < batch, tiles, 0)


@triton.jit
def span_of(first_program, last_program):
    """The programs that share an item, packed in one number: at most 2^15, the first with an index below 2^16."""
    return (first_program << 15) | (last_program - first_program)


@triton.jit
def program_of(span):
    """The first program of a span."""
    return span >> 15


@triton.jit
def parts_of(span):
    """The number of programs in a span."""
    return (span & 0x7FFF) + 1
