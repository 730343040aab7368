"""Causal attention over packed documents, forward (FlashAttention-2, arXiv:2307.08691).

A program takes BLOCK_M queries of one head, independent of document boundaries: `first[row]` is the first key that a
row attends to, so the grid depends only on the number of tokens, and no search for a document is needed. Keys and
values are read through tensor descriptors (TMA, from sm_90 on) or pointers. A head of D0 + D1 columns takes two
products: 192 is not a power of 2, but 128 and 64 are.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fetch(source, token, column, row, rows, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """Loads ROWS rows from `row` on and COLS columns from `column` on; rows past the end are 0."""
    if TMA:
        return source.load([row, column])
    else:
        offs = tl.arange(0, ROWS)
        start = source + ((tl.zeros([], tl.int64) + row) * token + column)
        at = start + (offs[:, None] * token + tl.arange(0, COLS)[None, :])
        return tl.load(at, (row + offs < rows)[:, None], other=0.0)


@triton.jit
def scores(
    q_0, q_1, k_0_src, k_1_src, k_0_token, k_1_token, k_0_col, k_1_col, start, k_rows,
    D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """q · kᵀ for the keys from `start` on."""
    k_0 = fetch(k_0_src, k_0_token, k_0_col, start, k_rows, BLOCK_N, D0, TMA)
    if D1 > 0:
        # The smaller product first: the compiler waits for it, and overlaps the larger one with what follows.
        k_1 = fetch(k_1_src, k_1_token, k_1_col, start, k_rows, BLOCK_N, D1, TMA)
        return tl.dot(q_0, tl.trans(k_0), tl.dot(q_1, tl.trans(k_1)))
    else:
        return tl.dot(q_0, tl.trans(k_0))


@triton.jit
def attend(
    acc, total, best, ahead, q_0, q_1, k_0_src, k_1_src, v_src, k_0_token, k_1_token, v_token, k_0_col, k_1_col, v_col,
    low, full, high, k_rows, first, last, scale_log2,
    D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Continues a softmax over the keys from `low` to `high`; from `full` on, a row attends only to `first`…`last`.

    With AHEAD, the scores of the next tile are computed during the softmax of this one; `ahead` holds those of the
    first tile. One loop, not two: with two, the assembler for sm_90 serialises the products with other work.
    """
    for start in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        score = ahead
        if AHEAD:
            ahead = scores(
                q_0, q_1, k_0_src, k_1_src, k_0_token, k_1_token, k_0_col, k_1_col, start + BLOCK_N, k_rows,
                D0, D1, BLOCK_N, TMA,
            )  # fmt: skip
        else:
            score = scores(
                q_0, q_1, k_0_src, k_1_src, k_0_token, k_1_token, k_0_col, k_1_col, start, k_rows, D0, D1, BLOCK_N, TMA
            )  # fmt: skip
        if start >= full:
            key = start + tl.arange(0, BLOCK_N)
            seen = (key[None, :] <= last[:, None]) & (key[None, :] >= first[:, None])
            score = tl.where(seen, score, -float("inf"))
        new_best = tl.maximum(best, tl.max(score, 1) * scale_log2)
        weight = tl.exp2(score * scale_log2 - new_best[:, None])
        decay = tl.exp2(best - new_best)
        total = total * decay + tl.sum(weight, 1)
        v = fetch(v_src, v_token, v_col, start, k_rows, BLOCK_N, DV, TMA)
        acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None])
        best = new_best
    return acc, total, best


@triton.jit(
    do_not_specialize=["q_rows", "k_rows", "shift", "tiles"], do_not_specialize_on_alignment=["first_ptr", "lse_ptr"]
)
def forward(
    q_0_src, q_1_src, k_0_src, k_1_src, v_src, out_ptr, lse_ptr, first_ptr,
    q_token, q_head, k_0_token, k_0_head, k_1_token, k_1_head, v_token, v_head,
    q_rows, k_rows, shift, heads, tiles, scale_log2,
    D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DOCUMENTS: tl.constexpr, CARRY: tl.constexpr, AHEAD: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = softmax(q · kᵀ · scale) · v; query r is at key r + shift and attends to no later one.

    Shapes: q [q_rows, heads, D0 + D1], k [k_rows, heads, D0 + D1] in two parts, v [k_rows, heads, DV], out contiguous
    [q_rows, heads, DV], lse [heads, q_rows]: the natural log-sum-exp. With CARRY, out (float32) and lse hold the
    result over earlier keys, which this launch continues.
    """
    # The longest rows of a head start first, so that the last programs are short.
    head = tl.program_id(0) // tiles
    row_0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    row = row_0 + offs_m
    last = tl.minimum(row + shift, k_rows - 1)
    high = tl.minimum(tl.minimum(row_0 + BLOCK_M, q_rows) + shift, k_rows)
    full = tl.minimum(row_0 + shift + 1, k_rows)
    if DOCUMENTS:
        first = tl.load(first_ptr + tl.minimum(row, q_rows - 1))
        low = tl.load(first_ptr + row_0)
        # A tile with several documents masks every key.
        full = tl.where(tl.load(first_ptr + tl.minimum(row_0 + BLOCK_M, q_rows) - 1) == low, full, low)
    else:
        first = tl.zeros([BLOCK_M], tl.int32)
        low = 0
    full = low + tl.maximum(full - low, 0) // BLOCK_N * BLOCK_N

    q_0 = fetch(q_0_src, q_token, head * q_head, row_0, q_rows, BLOCK_M, D0, TMA)
    q_1 = q_0
    if D1 > 0:
        q_1 = fetch(q_1_src, q_token, head * q_head, row_0, q_rows, BLOCK_M, D1, TMA)
    lse_at = lse_ptr + head.to(tl.int64) * q_rows + row
    out_at = out_ptr + (row.to(tl.int64) * heads + head)[:, None] * DV + tl.arange(0, DV)[None, :]
    row_ok = row < q_rows
    # A finite minimum: a row without keys so far subtracts it and gets weights of 0, not NaN.
    if CARRY:
        before = tl.load(lse_at, row_ok, other=-float("inf")) * 1.4426950408889634
        best = tl.maximum(before, -1.0e38)
        total = tl.exp2(before - best)
        acc = tl.load(out_at, row_ok[:, None], other=0.0)
    else:
        best = tl.full([BLOCK_M], -1.0e38, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, DV], tl.float32)
    ahead = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if AHEAD:
        ahead = scores(
            q_0, q_1, k_0_src, k_1_src, k_0_token, k_1_token, head * k_0_head, head * k_1_head, low, k_rows,
            D0, D1, BLOCK_N, TMA,
        )  # fmt: skip
    acc, total, best = attend(
        acc, total, best, ahead, q_0, q_1, k_0_src, k_1_src, v_src, k_0_token, k_1_token, v_token,
        head * k_0_head, head * k_1_head, head * v_head, low, full, high, k_rows, first, last, scale_log2,
        D0, D1, DV, BLOCK_N, AHEAD, TMA, STAGES,
    )  # fmt: skip
    empty = total == 0.0
    out = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), row_ok[:, None])
    lse = tl.where(empty, -float("inf"), (best + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    tl.store(lse_at, lse, row_ok)
