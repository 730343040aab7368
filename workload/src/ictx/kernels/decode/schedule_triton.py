"""Which program holds which tiles: equal runs of the whole batch's tiles, in order."""

from __future__ import annotations

import triton
import triton.language as tl

LONG = tl.constexpr(32)
"""Tiles of a long run."""


@triton.jit
def joint_runs(total, programs):
    """Tiles of a program and how many of the first programs hold one more, where few results are to be joined.

    Short runs are all as long as the longest must be, so that the last programs may have none: the slowest program has
    as much to do as if all shared. Of long runs, a program more is worth more than a result less.
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
    """Tiles of each sequence, row blocks together. An empty sequence has one: its output must be written too."""
    length = tl.load(lens_ptr + index, index < batch, other=0)
    tiles = tl.maximum((length + BLOCK_N - 1) // BLOCK_N, 1) * row_blocks
    return tl.where(index < batch, tiles, 0)


@triton.jit
def span_of(first_program, last_program):
    """The programs that share an item, in one number: at most 2^15, of which the first has a number below 2^16."""
    return (first_program << 15) | (last_program - first_program)


@triton.jit
def program_of(span):
    """The first program of a span."""
    return span >> 15


@triton.jit
def parts_of(span):
    """How many programs a span has."""
    return (span & 0x7FFF) + 1
