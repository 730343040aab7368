"""Products of one token's vector with a layer's weights: the work of a decode step outside attention.

A program releases the next launch, then starts to load its part of the weight before it waits for the vector: on Hopper
and later (DEPENDENT) the previous launch may still be running (programmatic dependent launch), so that loading the
weights overlaps with its end. If there are more rows than resident programs, each program takes several in turn and
loads the next before it multiplies: memory stays busy, and the next launch has room because all programs have started.
Weights are read once and evicted from the caches first (`evict_first`); the vector, which all programs read, and the
data of the next launch stay. Sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ictx.kernels.rope_cache.triton import write_row


@triton.jit
def multiply(
    weight, up, x, factor, residual, out_at, ok,
    GATED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Stores the rows' products with the vector, times `factor`, gated and with the residual added if enabled."""
    total = tl.sum(weight.to(tl.float32) * x[None, :], 1) * factor
    if GATED:
        total = total * tl.sigmoid(total) * (tl.sum(up.to(tl.float32) * x[None, :], 1) * factor)
    if ADD:
        total += residual
    tl.store(out_at, total.to(out_at.dtype.element_ty), ok)


@triton.jit
def project(
    x_ptr, gain_ptr, weight_ptr, up_ptr, residual_ptr, out_ptr, eps, rows,
    x_group, weight_group, weight_row, out_group,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, PADDED: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out = weight · x, COUNT times BLOCK rows per program; the second grid axis is the group.

    NORM: x is normalised (RMSNorm) and multiplied by `gain` first. GATED: silu(weight · x) · (up · x). ADD: + residual.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    group = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    step = tl.num_programs(0) * BLOCK
    column = tl.arange(0, PADDED)
    row_ok, column_ok = row < rows, column < WIDTH
    weight_ptr += group * weight_group
    out_ptr += group * out_group
    at = row[:, None].to(tl.int64) * weight_row + column[None, :]
    ok = row_ok[:, None] & column_ok[None, :]
    weight = tl.load(weight_ptr + at, ok, other=0.0, eviction_policy="evict_first")
    up = weight
    if GATED:
        up = tl.load(up_ptr + at, ok, other=0.0, eviction_policy="evict_first")
    if NORM:
        gain = tl.load(gain_ptr + column, column_ok, other=0.0)
    if DEPENDENT:
        gdc_wait()
    x = tl.load(x_ptr + group * x_group + column, column_ok, other=0.0).to(tl.float32)
    # Loaded together with the vector, not after the product, to save a memory latency.
    residual = 0.0
    if ADD:
        residual = tl.load(residual_ptr + row, row_ok, other=0.0).to(tl.float32)
    factor = 1.0
    if NORM:
        # The norm is applied to the result, so that the root is computed in parallel with the products.
        factor = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
        x = x * gain.to(tl.float32)
    if COUNT == 1:
        multiply(weight, up, x, factor, residual, out_ptr + row, row_ok, GATED, ADD)
    else:
        # The last turn loads nothing, but is not peeled: a second copy of the products would take registers.
        for turn in tl.range(COUNT, num_stages=1):
            at += step.to(tl.int64) * weight_row
            coming_ok = (row + step < rows) & (turn < COUNT - 1)
            ok = coming_ok[:, None] & column_ok[None, :]
            weight_coming = tl.load(weight_ptr + at, ok, other=0.0, eviction_policy="evict_first")
            up_coming = weight_coming
            if GATED:
                up_coming = tl.load(up_ptr + at, ok, other=0.0, eviction_policy="evict_first")
            residual_coming = residual
            if ADD:
                residual_coming = tl.load(residual_ptr + row + step, coming_ok, other=0.0).to(tl.float32)
            multiply(weight, up, x, factor, residual, out_ptr + row, row < rows, GATED, ADD)
            weight, up, residual = weight_coming, up_coming, residual_coming
            row += step


@triton.jit(
    do_not_specialize=["row_stride", "block_rows", "block_size"],
    do_not_specialize_on_alignment=["slot_ptr", "cos_ptr", "sin_ptr"],
)
def absorb(
    q_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, weight_head, heads,
    new_ptr, gain_ptr, slot_ptr, latent_ptr, scale_ptr, key_ptr, eps, row_stride, block_rows, block_size,
    NOPE: tl.constexpr, PADDED: tl.constexpr, ROPE: tl.constexpr, LATENT: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, ROW: tl.constexpr, ROW_BYTES: tl.constexpr, STORED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out = (q_nope · w_uk, q_rope rotated by its position's angle) of a head, COLUMNS of the latent per program.

    A head's weight begins with w_uk, [NOPE, LATENT]. One more program writes the token's row of the cache, which does
    not depend on the others; this saves a launch.
    """
    parts: tl.constexpr = LATENT // COLUMNS
    head = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    if head == heads:
        if DEPENDENT:
            gdc_launch_dependents()
            gdc_wait()
        token = tl.full((), 0, tl.int64)
        write_row(
            token, new_ptr, gain_ptr, cos_ptr, sin_ptr, slot_ptr, latent_ptr, scale_ptr, key_ptr, eps,
            row_stride, block_rows, block_size, LATENT, ROPE, GROUP, ROW, ROW_BYTES, STORED,
        )  # fmt: skip
    else:
        if DEPENDENT:
            gdc_launch_dependents()
        row = tl.arange(0, PADDED)
        column = part * COLUMNS + tl.arange(0, COLUMNS)
        ok = row < NOPE
        weight = tl.load(
            weight_ptr + head * weight_head + row[:, None] * LATENT + column[None, :], ok[:, None], other=0.0,
            eviction_policy="evict_first",
        )  # fmt: skip
        if DEPENDENT:
            gdc_wait()
        q_at = q_ptr + head * (NOPE + ROPE)
        out_at = out_ptr + head * (LATENT + ROPE)
        q = tl.load(q_at + row, ok, other=0.0).to(tl.float32)
        if part == 0:
            pair = tl.arange(0, ROPE // 2)
            even = tl.load(q_at + NOPE + 2 * pair).to(tl.float32)
            odd = tl.load(q_at + NOPE + 2 * pair + 1).to(tl.float32)
            cos, sin = tl.load(cos_ptr + pair), tl.load(sin_ptr + pair)
            tl.store(out_at + LATENT + 2 * pair, (even * cos - odd * sin).to(out_ptr.dtype.element_ty))
            tl.store(out_at + LATENT + 2 * pair + 1, (even * sin + odd * cos).to(out_ptr.dtype.element_ty))
        total = tl.sum(weight.to(tl.float32) * q[:, None], 0)
        tl.store(out_at + column, total.to(out_ptr.dtype.element_ty))
