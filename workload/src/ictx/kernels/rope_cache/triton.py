"""Writes new tokens' latents and keys to the cache, one program per token."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def nearest(x):
    """The nearest integer, half to even, of a float32 below 2^22: adding 1.5 · 2^23 rounds off the fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def e4m3(x):
    """The byte of the nearest e4m3 value, half to even, of a float32 of at most 448: no cast before sm_89."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    # The mantissa shrinks from 23 to 3 bits, the exponent's bias from 127 to 7. Below 2^-6 the step is 2^-9.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = tl.abs(x) < 0.015625
    return (tl.where(small, nearest(tl.abs(x) * 512.0).to(tl.int32), normal) | sign).to(tl.uint8)


@triton.jit
def write_row(
    token, x_ptr, weight_ptr, cos_ptr, sin_ptr, slot_ptr, latent_ptr, scale_ptr, key_ptr, eps,
    row_stride, block_rows, block_size,
    LATENT: tl.constexpr, ROPE: tl.constexpr, GROUP: tl.constexpr, ROW: tl.constexpr, ROW_BYTES: tl.constexpr,
    STORED: tl.constexpr,
):  # fmt: skip
    """cache[slot] = norm(latent) · weight, and the key with each adjacent pair rotated by its angle.

    Strides count elements of `x_ptr`; `block_rows` is the block stride in rows. A negative slot is skipped.
    """
    groups: tl.constexpr = LATENT // GROUP
    group = tl.arange(0, groups)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    pair = tl.arange(0, ROPE // 2)
    x_at = x_ptr + token * row_stride
    # All loads are issued together: dependent loads would each add a memory latency.
    slot = tl.load(slot_ptr + token)
    x = tl.load(x_at + column).to(tl.float32)
    even = tl.load(x_at + LATENT + 2 * pair).to(tl.float32)
    odd = tl.load(x_at + LATENT + 2 * pair + 1).to(tl.float32)
    cos = tl.load(cos_ptr + token * (ROPE // 2) + pair)
    sin = tl.load(sin_ptr + token * (ROPE // 2) + pair)
    weight = tl.load(weight_ptr + column).to(tl.float32)
    if slot >= 0:
        power = tl.sum(tl.sum(x * x, 1), 0) / LATENT
        x = x * tl.rsqrt(power + eps) * weight

        block = (slot // block_size) * block_rows
        inner = slot % block_size
        if STORED == "plain":
            latent_at = latent_ptr + (block + inner) * ROW
            key_at = latent_at + LATENT
            tl.store(latent_at + column, x.to(latent_ptr.dtype.element_ty))
        else:
            largest: tl.constexpr = 127.0 if STORED == "int8" else 448.0
            scale = tl.math.div_rn(tl.max(tl.abs(x), 1), tl.full([groups], largest, tl.float32))
            x = tl.math.div_rn(x, tl.broadcast_to(tl.where(scale == 0.0, 1.0, scale)[:, None], [groups, GROUP]))
            latent_at = latent_ptr + block * ROW_BYTES + inner * LATENT
            if STORED == "int8":
                tl.store(latent_at + column, (nearest(x) + 128.0).to(tl.int32).to(tl.uint8))
            else:
                tl.store(latent_at + column, e4m3(x))
            # The block's latents are followed by its scales, group by group, then by its keys.
            scale_at = scale_ptr + block * (ROW_BYTES // 4) + block_size.to(tl.int64) * (LATENT // 4) + inner
            tl.store(scale_at + group * block_size, scale)
            before: tl.constexpr = (LATENT + 4 * groups) // 2
            key_at = key_ptr + block * (ROW_BYTES // 2) + block_size.to(tl.int64) * before + inner * ROPE
        tl.store(key_at + 2 * pair, (even * cos - odd * sin).to(key_ptr.dtype.element_ty))
        tl.store(key_at + 2 * pair + 1, (even * sin + odd * cos).to(key_ptr.dtype.element_ty))


@triton.jit(
    do_not_specialize=["row_stride", "block_rows", "block_size"],
    do_not_specialize_on_alignment=["slot_ptr", "cos_ptr", "sin_ptr"],
)
def rope_cache(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, slot_ptr, latent_ptr, scale_ptr, key_ptr, eps,
    row_stride, block_rows, block_size,
    LATENT: tl.constexpr, ROPE: tl.constexpr, GROUP: tl.constexpr, ROW: tl.constexpr, ROW_BYTES: tl.constexpr,
    STORED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Writes each token's row, one per program."""
    token = tl.program_id(0).to(tl.int64)
    if DEPENDENT:
        # The previous launch may still run (programmatic dependent launch).
        gdc_launch_dependents()
        gdc_wait()
    write_row(
        token, x_ptr, weight_ptr, cos_ptr, sin_ptr, slot_ptr, latent_ptr, scale_ptr, key_ptr, eps,
        row_stride, block_rows, block_size, LATENT, ROPE, GROUP, ROW, ROW_BYTES, STORED,
    )  # fmt: skip
