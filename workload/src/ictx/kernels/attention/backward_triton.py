"""Backward of causal attention over packed documents (FlashAttention-2, arXiv:2307.08691, algorithm 2).

`keys_values` takes a tile of keys and iterates over the queries that attend to it; `queries` takes a tile of queries
and iterates over their keys. Both compute the scores, 7 products instead of 5. Accumulating the queries' gradient in
memory from the first kernel was slower on an H100, and its order of additions, hence its rounding, differed between
runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ictx.kernels.attention.triton import fetch


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["lse_ptr"])
def row_sums(
    out_ptr, grad_ptr, lse_ptr, sums_ptr, grad_token, grad_head, rows, padded, heads,
    DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """sums[0] = lse in base 2, sums[1] = out · grad, which the softmax's derivative subtracts; [heads, padded] each.

    The log-sum-exp of padding is infinite, so that its weights are 0.
    """
    head = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, DV)
    ok = (row < rows)[:, None]
    out = tl.load(out_ptr + (row * heads + head)[:, None] * DV + cols[None, :], ok, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + (row * grad_token + head * grad_head)[:, None] + cols[None, :], ok, other=0.0)
    lse = tl.load(lse_ptr + head.to(tl.int64) * rows + row, row < rows, other=float("inf"))
    at = sums_ptr + head.to(tl.int64) * padded + row
    tl.store(at, lse * 1.4426950408889634, row < padded)
    tl.store(at + tl.num_programs(1).to(tl.int64) * padded, tl.sum(out * grad.to(tl.float32), 1), row < padded)


@triton.jit
def through_queries(
    dk_0, dk_1, dv, k_0, k_1, v, q_0_src, q_1_src, grad_src, lse_ptr, delta_ptr,
    q_token, grad_token, q_col, grad_col, low, high, key, key_end, rows, scale_log2,
    D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of the queries from `low` to `high`, in one loop that masks all of them.

    With separate loops for masked and unmasked queries, accumulator registers are moved between the loops, and the
    assembler for sm_90 serialises the products with other work (its note C7515). One loop: 40 ms became 34 ms.
    """
    offs_m = tl.arange(0, BLOCK_M)
    for start in tl.range(low, high, BLOCK_M, num_stages=STAGES):
        start = tl.multiple_of(start, BLOCK_M)
        row = start + offs_m
        q_0 = fetch(q_0_src, q_token, q_col, start, rows, BLOCK_M, D0, TMA)
        # Keys are the rows of these products, so that weights and their gradients are left operands without transposes.
        score = tl.dot(k_0, tl.trans(q_0))
        if D1 > 0:
            q_1 = fetch(q_1_src, q_token, q_col, start, rows, BLOCK_M, D1, TMA)
            score = tl.dot(k_1, tl.trans(q_1), score)
        grad = fetch(grad_src, grad_token, grad_col, start, rows, BLOCK_M, DV, TMA)
        d_weight = tl.dot(v, tl.trans(grad))
        lse = tl.load(lse_ptr + row)
        delta = tl.load(delta_ptr + row)
        weight = tl.exp2(score * scale_log2 - lse[None, :])
        seen = (key[:, None] <= row[None, :]) & (row[None, :] < key_end[:, None])
        weight = tl.where(seen, weight, 0.0)
        d_score = (weight * (d_weight - delta[None, :])).to(q_0.dtype)
        dv = tl.dot(weight.to(grad.dtype), grad, dv)
        dk_0 = tl.dot(d_score, q_0, dk_0)
        if D1 > 0:
            dk_1 = tl.dot(d_score, q_1, dk_1)
    return dk_0, dk_1, dv


@triton.jit(do_not_specialize=["rows", "tiles"], do_not_specialize_on_alignment=["end_ptr"])
def keys_values(
    q_0_src, q_1_src, k_0_src, k_1_src, v_src, grad_src, dk_ptr, dv_ptr, sums_ptr, end_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head,
    rows, padded, heads, tiles, scale, scale_log2,
    D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DOCUMENTS: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dv = weightsᵀ · grad and dk = scale · d_scoresᵀ · q for a tile of keys; dk and dv are contiguous."""
    head = tl.program_id(0) // tiles
    key_0 = (tl.program_id(0) % tiles) * BLOCK_N
    key = key_0 + tl.arange(0, BLOCK_N)
    # Tiles of queries begin at multiples of BLOCK_M.
    low = key_0 // BLOCK_M * BLOCK_M
    high = rows
    key_end = tl.full([BLOCK_N], rows, tl.int32)
    if DOCUMENTS:
        key_end = tl.load(end_ptr + tl.minimum(key, rows - 1))
        high = tl.load(end_ptr + tl.minimum(key_0 + BLOCK_N, rows) - 1)

    k_0 = fetch(k_0_src, k_token, head * k_head, key_0, rows, BLOCK_N, D0, TMA)
    k_1 = k_0
    dk_1 = tl.zeros([BLOCK_N, D1 if D1 > 0 else D0], tl.float32)
    if D1 > 0:
        k_1 = fetch(k_1_src, k_token, head * k_head, key_0, rows, BLOCK_N, D1, TMA)
    v = fetch(v_src, v_token, head * v_head, key_0, rows, BLOCK_N, DV, TMA)
    dk_0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv = tl.zeros([BLOCK_N, DV], tl.float32)
    lse_head = sums_ptr + head.to(tl.int64) * padded
    delta_head = sums_ptr + (head.to(tl.int64) + heads) * padded
    dk_0, dk_1, dv = through_queries(
        dk_0, dk_1, dv, k_0, k_1, v, q_0_src, q_1_src, grad_src, lse_head, delta_head,
        q_token, grad_token, head * q_head, head * grad_head, low, high, key, key_end, rows, scale_log2,
        D0, D1, DV, BLOCK_M, TMA, STAGES,
    )  # fmt: skip
    ok = (key < rows)[:, None]
    place = (key.to(tl.int64) * heads + head)[:, None]
    dtype = dk_ptr.dtype.element_ty
    tl.store(dv_ptr + place * DV + tl.arange(0, DV)[None, :], dv.to(dtype), ok)
    dk_at = dk_ptr + place * (D0 + D1)
    tl.store(dk_at + tl.arange(0, D0)[None, :], (dk_0 * scale).to(dtype), ok)
    if D1 > 0:
        tl.store(dk_at + D0 + tl.arange(0, D1)[None, :], (dk_1 * scale).to(dtype), ok)


@triton.jit
def through_keys(
    dq_0, dq_1, q_0, q_1, grad, k_0_src, k_1_src, v_src, k_token, v_token, k_col, v_col,
    low, high, rows, first, row, lse, delta, scale_log2,
    D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of the keys from `low` to `high`."""
    for start in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        k_0 = fetch(k_0_src, k_token, k_col, start, rows, BLOCK_N, D0, TMA)
        score = tl.dot(q_0, tl.trans(k_0))
        if D1 > 0:
            k_1 = fetch(k_1_src, k_token, k_col, start, rows, BLOCK_N, D1, TMA)
            score = tl.dot(q_1, tl.trans(k_1), score)
        weight = tl.exp2(score * scale_log2 - lse[:, None])
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)
            seen = (key[None, :] <= row[:, None]) & (key[None, :] >= first[:, None])
            weight = tl.where(seen, weight, 0.0)
        v = fetch(v_src, v_token, v_col, start, rows, BLOCK_N, DV, TMA)
        d_weight = tl.dot(grad, tl.trans(v))
        d_score = (weight * (d_weight - delta[:, None])).to(k_0.dtype)
        dq_0 = tl.dot(d_score, k_0, dq_0)
        if D1 > 0:
            dq_1 = tl.dot(d_score, k_1, dq_1)
    return dq_0, dq_1


@triton.jit(do_not_specialize=["rows", "tiles"], do_not_specialize_on_alignment=["first_ptr"])
def queries(
    q_0_src, q_1_src, k_0_src, k_1_src, v_src, grad_src, dq_ptr, sums_ptr, first_ptr, q_token, q_head, k_token, k_head,
    v_token, v_head, grad_token, grad_head, rows, padded, heads, tiles, scale, scale_log2,
    D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DOCUMENTS: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq = scale · d_scores · k for a tile of queries, contiguous [rows, heads, D0 + D1]."""
    head = tl.program_id(0) // tiles
    row_0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    row = row_0 + tl.arange(0, BLOCK_M)
    row_ok = row < rows
    high = tl.minimum(row_0 + BLOCK_M, rows)
    full = row_0 + 1
    if DOCUMENTS:
        first = tl.load(first_ptr + tl.minimum(row, rows - 1))
        low = tl.load(first_ptr + row_0)
        full = tl.where(tl.load(first_ptr + high - 1) == low, full, low)
    else:
        first = tl.zeros([BLOCK_M], tl.int32)
        low = 0
    full = low + (full - low) // BLOCK_N * BLOCK_N

    q_0 = fetch(q_0_src, q_token, head * q_head, row_0, rows, BLOCK_M, D0, TMA)
    q_1 = q_0
    dq_1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else D0], tl.float32)
    if D1 > 0:
        q_1 = fetch(q_1_src, q_token, head * q_head, row_0, rows, BLOCK_M, D1, TMA)
    grad = fetch(grad_src, grad_token, head * grad_head, row_0, rows, BLOCK_M, DV, TMA)
    dq_0 = tl.zeros([BLOCK_M, D0], tl.float32)
    lse = tl.load(sums_ptr + head.to(tl.int64) * padded + row)
    delta = tl.load(sums_ptr + (head.to(tl.int64) + heads) * padded + row)
    dq_0, dq_1 = through_keys(
        dq_0, dq_1, q_0, q_1, grad, k_0_src, k_1_src, v_src, k_token, v_token, head * k_head, head * v_head,
        low, full, rows, first, row, lse, delta, scale_log2, D0, D1, DV, BLOCK_N, False, TMA, STAGES,
    )  # fmt: skip
    dq_0, dq_1 = through_keys(
        dq_0, dq_1, q_0, q_1, grad, k_0_src, k_1_src, v_src, k_token, v_token, head * k_head, head * v_head,
        full, high, rows, first, row, lse, delta, scale_log2, D0, D1, DV, BLOCK_N, True, TMA, STAGES,
    )  # fmt: skip
    place = dq_ptr + (row.to(tl.int64) * heads + head)[:, None] * (D0 + D1)
    dtype = dq_ptr.dtype.element_ty
    tl.store(place + tl.arange(0, D0)[None, :], (dq_0 * scale).to(dtype), row_ok[:, None])
    if D1 > 0:
        tl.store(place + D0 + tl.arange(0, D1)[None, :], (dq_1 * scale).to(dtype), row_ok[:, None])
