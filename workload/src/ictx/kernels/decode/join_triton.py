"""How partial softmaxes of one row block become its output, within the launch that made them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def join(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, row_out, row, col, first_program, parts,
    BLOCK_M: tl.constexpr, LATENT: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Joins `COLS` columns of one row out of the partial softmaxes of `parts` neighbouring programs."""
    cols = col + tl.arange(0, COLS)
    # A program has two places: one for a sequence that began before it, one for a sequence that goes on after it. The
    # first part lies in its second place, all others in their first.
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

    Slices are as many as there are programs to join them, more or less: whole rows of few parts, narrower ones of more
    parts, which are all read at once. COLS columns out of up to 160 parts, PARTS at once; 32 where that many are too
    much to hold.
    """
    here = tl.minimum(rows - row_block * BLOCK_M, BLOCK_M)
    base = sequence.to(tl.int64) * rows + row_block * BLOCK_M
    if WIDE or parts <= 16:
        join_slices(
            out_ptr, lse_ptr, part_ptr, part_lse_ptr, base, here, first_program, parts, share, shares,
            BLOCK_M, LATENT, LATENT, 16,
        )  # fmt: skip
    elif BLOCK_M > 16:
        # More tiers than these two take registers from the loop over tokens, which has none to spare here.
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
    """Counts this program among the `parts` that join a row block; returns the counter before, for `ticket_of`.

    The first program counts as 2^31 - (parts - 1), every other as 1: when all have come, the sign bit has turned and
    the rest is zero again, whatever `parts` was. So nothing is cleared, and waiting takes one hop.
    """
    return tl.atomic_add(count_ptr, tl.where(is_first, -2147483648 - (parts - 1), 1), sem="acq_rel")


@triton.jit
def ticket_of(item, before):
    """An item and the sign of its counter, at this program's arrival, in one number: not negative."""
    return 2 * item + tl.where(before < 0, 1, 0)


@triton.jit
def wait(count_ptr, ticket):
    """Waits until all programs have arrived. Reads only: 132 programs that poll with atomics hold up those to come."""
    at = count_ptr.to(tl.int64)
    before = -(ticket & 1)
    now = before
    while (now ^ before) >= 0:
        now = tl.inline_asm_elementwise("ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [at], tl.int32, False, 1)
    tl.debug_barrier()
