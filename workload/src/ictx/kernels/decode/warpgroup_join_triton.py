"""`join_triton` with explicit layouts, for `warpgroup_triton`: joins partial softmaxes into the output."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def join(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, row_out, row, col, first_program, parts,
    BLOCK_M: gl.constexpr, LATENT: gl.constexpr, COLS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Joins `COLS` columns of one row from the partial softmaxes of `parts` neighbouring programs."""
    # Eight columns per thread; the remaining threads are distributed over the parts.
    ROW: gl.constexpr = 32 if COLS >= 256 else COLS // 8
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ROW, ROW], [128 * ROW // (4 * COLS), COLS // 8 // ROW], [1, 0])
    cols = col + gl.arange(0, COLS, layout=gl.SliceLayout(0, WIDE))
    at = part_ptr + (2 * first_program.to(gl.int64) * BLOCK_M + row) * LATENT + cols[None, :]
    lse_at = part_lse_ptr + row * (2 * gl.num_programs(0)) + 2 * first_program
    best = -float("inf")
    weight_sum = 0.0
    acc = gl.zeros([COLS], gl.float32, gl.SliceLayout(0, WIDE))
    for start in range(0, parts, PARTS):
        index = start + gl.arange(0, PARTS, layout=gl.SliceLayout(1, WIDE))
        place = gl.maximum(2 * index, 1)
        ok = index < parts
        lse = gl.load(lse_at + place, ok, other=-float("inf"), cache_modifier=".cg")
        values = gl.load(at + place[:, None] * (BLOCK_M * LATENT), ok[:, None], other=0.0, cache_modifier=".cg")
        new_best = gl.maximum(best, gl.max(lse, 0))
        anchor = gl.where(new_best == -float("inf"), 0.0, new_best)
        weight = gl.exp2(lse - anchor)
        decay = gl.exp2(best - anchor)
        acc = acc * decay + gl.sum(values.to(gl.float32) * weight[:, None], 0)
        weight_sum = weight_sum * decay + gl.sum(weight, 0)
        best = new_best
    empty = weight_sum == 0.0
    out = gl.where(empty, 0.0, acc / gl.where(empty, 1.0, weight_sum))
    gl.store(out_ptr + row_out * LATENT + cols, out.to(out_ptr.dtype.element_ty))
    if col == 0:
        lse = gl.where(empty, -float("inf"), (best + gl.log2(gl.where(empty, 1.0, weight_sum))) * 0.6931471805599453)
        gl.store(lse_ptr + row_out, lse)


@gluon.jit
def join_slices(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, base, here, first_program, parts, share, shares,
    BLOCK_M: gl.constexpr, LATENT: gl.constexpr, COLS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Joins every `shares`-th slice of `here` rows, beginning with slice `share`."""
    slices: gl.constexpr = LATENT // COLS
    for piece in range(share, here * slices, shares):
        row = piece // slices
        join(
            out_ptr, lse_ptr, part_ptr, part_lse_ptr, base + row, row, (piece % slices) * COLS, first_program, parts,
            BLOCK_M, LATENT, COLS, PARTS,
        )  # fmt: skip


@gluon.jit
def join_share(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, sequence, row_block, rows, first_program, parts, share, shares,
    BLOCK_M: gl.constexpr, LATENT: gl.constexpr,
):  # fmt: skip
    """Joins this program's share of a row block, in about as many slices as programs."""
    here = gl.minimum(rows - row_block * BLOCK_M, BLOCK_M)
    base = sequence.to(gl.int64) * rows + row_block * BLOCK_M
    if parts <= 16:
        join_slices(
            out_ptr, lse_ptr, part_ptr, part_lse_ptr, base, here, first_program, parts, share, shares,
            BLOCK_M, LATENT, LATENT, 16,
        )  # fmt: skip
    elif parts <= 64:
        join_slices(
            out_ptr, lse_ptr, part_ptr, part_lse_ptr, base, here, first_program, parts, share, shares,
            BLOCK_M, LATENT, 128, 64,
        )  # fmt: skip
    elif parts <= 160:
        join_slices(
            out_ptr, lse_ptr, part_ptr, part_lse_ptr, base, here, first_program, parts, share, shares,
            BLOCK_M, LATENT, 64, 256,
        )  # fmt: skip
    else:
        join_slices(
            out_ptr, lse_ptr, part_ptr, part_lse_ptr, base, here, first_program, parts, share, shares,
            BLOCK_M, LATENT, 32, 256,
        )  # fmt: skip
