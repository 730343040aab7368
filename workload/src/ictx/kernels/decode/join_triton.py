"""Joins the partial softmaxes of a row block into its output, in the launch that computed them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def join(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, row_out, row, col, first_program, parts,
    BLOCK_M: tl.constexpr, LATENT: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Joins `COLS` columns of one row from the partial softmaxes of `parts` neighbouring programs."""
    cols = col + tl.arange(0, COLS)
    # A program has two places: one for a sequence that began in an earlier program, one for a sequence that continues
    # in a later one. The first part is in its program's second place, all others in the first.
    at = part_ptr + (2 * first_program.to(tl.int64) * BLOCK_M + row) * LATENT + cols[None, :]
    lse_at = part_lse_ptr + row * (2 * tl.num_programs(0)) + 2 * first_program
    best = -float("inf")
    weight_sum = 0.0
    acc = tl.zeros([COLS], tl.float32)
    for start in range(0, parts, PARTS):
        index = start + tl.arange(0, PARTS)
        place = tl.maximum(2 * index, 1)
        ok = index < parts
        # Other programs wrote these: .cg reads past this multiprocessor's own cache.
        lse = tl.load(lse_at + place, ok, other=-float("inf"), cache_modifier=".cg")
        values = tl.load(at + place[:, None] * (BLOCK_M * LATENT), ok[:, None], other=0.0, cache_modifier=".cg")
        new_best = tl.maximum(best, tl.max(lse, 0))
        anchor = tl.where(new_best == -float("inf"), 0.0, new_best)
        weight = tl.exp2(lse - anchor)
        decay = tl.exp2(best - anchor)
        acc = acc * decay + tl.sum(values.to(tl.float32) * weight[:, None], 0)
        weight_sum = weight_sum * decay + tl.sum(weight, 0)
        best = new_best
    empty = weight_sum == 0.0
    out = tl.where(empty, 0.0, acc / tl.where(empty, 1.0, weight_sum))
    tl.store(out_ptr + row_out * LATENT + cols, out.to(out_ptr.dtype.element_ty))
    if col == 0:
        lse = tl.where(empty, -float("inf"), (best + tl.log2(tl.where(empty, 1.0, weight_sum))) * 0.6931471805599453)
        tl.store(lse_ptr + row_out, lse)


@triton.jit
def join_slices(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, base, here, first_program, parts, share, shares,
    BLOCK_M: tl.constexpr, LATENT: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Joins every `shares`-th slice of `here` rows, beginning with slice `share`."""
    slices: tl.constexpr = LATENT // COLS
    for piece in range(share, here * slices, shares):
        row = piece // slices
        join(
            out_ptr, lse_ptr, part_ptr, part_lse_ptr, base + row, row, (piece % slices) * COLS, first_program, parts,
            BLOCK_M, LATENT, COLS, PARTS,
        )  # fmt: skip


@triton.jit
def join_share(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, sequence, row_block, rows, first_program, parts, share, shares,
    BLOCK_M: tl.constexpr, LATENT: tl.constexpr, WIDE: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Joins this program's share of a row block.

    There are about as many slices as programs to join them: whole rows if there are few parts, narrower slices if there
    are more, so that all parts are read at once. Up to 160 parts use COLS columns and PARTS at once; more use 32
    columns, to fit in registers.
    """
    here = tl.minimum(rows - row_block * BLOCK_M, BLOCK_M)
    base = sequence.to(tl.int64) * rows + row_block * BLOCK_M
    if WIDE or parts <= 16:
        join_slices(
            out_ptr, lse_ptr, part_ptr, part_lse_ptr, base, here, first_program, parts, share, shares,
            BLOCK_M, LATENT, LATENT, 16,
        )  # fmt: skip
    elif BLOCK_M > 16:
        # Only two tiers: more would take registers from the loop over tokens.
        join_slices(
            out_ptr, lse_ptr, part_ptr, part_lse_ptr, base, here, first_program, parts, share, shares,
            BLOCK_M, LATENT, COLS, 16384 // COLS,
        )  # fmt: skip
    elif parts <= 64:
        join_slices(
            out_ptr, lse_ptr, part_ptr, part_lse_ptr, base, here, first_program, parts, share, shares,
            BLOCK_M, LATENT, 128, 64,
        )  # fmt: skip
    elif COLS == 64 and parts <= 160:
        join_slices(
            out_ptr, lse_ptr, part_ptr, part_lse_ptr, base, here, first_program, parts, share, shares,
            BLOCK_M, LATENT, 64, PARTS,
        )  # fmt: skip
    else:
        join_slices(
            out_ptr, lse_ptr, part_ptr, part_lse_ptr, base, here, first_program, parts, share, shares,
            BLOCK_M, LATENT, 32, 512,
        )  # fmt: skip


@triton.jit
def arrive(count_ptr, is_first, parts):
    """Counts this program among the `parts` that join a row block; returns the previous counter, for `ticket_of`.

    The first program adds 2^31 - (parts - 1), every other adds 1: when all have arrived, the sign bit has flipped and
    the other bits are zero again for any `parts`. So the counter needs no reset, and waiting takes one memory access.
    """
    return tl.atomic_add(count_ptr, tl.where(is_first, -2147483648 - (parts - 1), 1), sem="acq_rel")


@triton.jit
def ticket_of(item, before):
    """An item and the sign of its counter at this program's arrival, packed in one non-negative number."""
    return 2 * item + tl.where(before < 0, 1, 0)


@triton.jit
def wait(count_ptr, ticket):
    """Waits until all programs have arrived. Polls with loads: atomics from 132 programs would delay later arrivals."""
    at = count_ptr.to(tl.int64)
    before = -(ticket & 1)
    now = before
    while (now ^ before) >= 0:
        now = tl.inline_asm_elementwise("ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [at], tl.int32, False, 1)
    tl.debug_barrier()
