"""Unpacks values of a quantised cache, two per 16-bit word, to float16.

Each word is unpacked independently, so the compiler moves *words* into the layout of a product's operand as it does
16-bit values (asynchronous copies, `ldmatrix`), and unpacks them in registers. Loads of 8-bit values could use
neither: `ldmatrix` does not support them.

A byte zero-extended to 16 bits is a subnormal float16: byte × 2^-24. So two int8 values, stored with 128 added, take
two instructions, and two e4m3 values as many. Both forms below, PTX and plain (which compiles to twice as many
instructions), are exact for every stored byte of int8, and of e4m3 except NaN, which `quantise` never stores.
"""

from __future__ import annotations

import triton
import triton.language as tl

INT8_UNIT = tl.constexpr(2.0**-24)
INT8_LOW = tl.constexpr("{ .reg .b32 a, c; and.b32 a, $1, 0x00ff00ff; mov.b32 c, 0x00800080; sub.rn.f16x2 $0, a, c; }")
INT8_HIGH = tl.constexpr("{ .reg .b32 a, c; prmt.b32 a, $1, 0, 0x4341; mov.b32 c, 0x00800080; sub.rn.f16x2 $0, a, c; }")
FP8_LOW = tl.constexpr(
    "{ .reg .b32 a; .reg .b16 b; prmt.b32 a, $1, 0, 0x0020; cvt.u16.u32 b, a; cvt.rn.f16x2.e4m3x2 $0, b; }"
)
FP8_HIGH = tl.constexpr(
    "{ .reg .b32 a; .reg .b16 b; prmt.b32 a, $1, 0, 0x0031; cvt.u16.u32 b, a; cvt.rn.f16x2.e4m3x2 $0, b; }"
)


@triton.jit
def unpack(words, STORED: tl.constexpr, ASM: tl.constexpr):
    """Returns the lower and the upper value of each int16 word as float16.

    STORED is int8, whose values are returned times 2^-24, or fp8. ASM selects PTX, which Triton's interpreter lacks.
    """
    if ASM:
        low: tl.constexpr = INT8_LOW if STORED == "int8" else FP8_LOW
        high: tl.constexpr = INT8_HIGH if STORED == "int8" else FP8_HIGH
        return (
            tl.inline_asm_elementwise(low, "=r,r", [words], tl.float16, True, 2),
            tl.inline_asm_elementwise(high, "=r,r", [words], tl.float16, True, 2),
        )
    else:
        return unpack_byte(words, STORED), unpack_byte(words >> 8, STORED)


@triton.jit
def unpack_byte(word, STORED: tl.constexpr):
    """The lower value of each word, as `unpack` returns it."""
    if STORED == "int8":
        return (word & 0xFF).to(tl.float16, bitcast=True) - 128 * INT8_UNIT
    else:
        # The bits of e4m3 in the position of float16, whose exponent bias is larger by 8.
        return (((word & 0x7F) << 7) | ((word & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def halves(q, factor, BLOCK_M: tl.constexpr):
    """A group of queries as float16, times `factor`, split into even and odd columns as `unpack` splits keys."""
    return tl.split(tl.reshape((q.to(tl.float32) * factor[:, None]).to(tl.float16), [BLOCK_M, 64, 2]))


@triton.jit
def add_score(score, q_low, q_high, words, scale, STORED: tl.constexpr, ASM: tl.constexpr):
    """Adds one group's part of the scores."""
    low, high = unpack(words, STORED, ASM)
    part = tl.dot(q_low, tl.trans(low))
    part = tl.dot(q_high, tl.trans(high), part)
    return score + part * scale[None, :]


@triton.jit
def add_values(acc_low, acc_high, decay, scaled, words, STORED: tl.constexpr, ASM: tl.constexpr):
    """Adds one group's weighted values to the decayed accumulators."""
    low, high = unpack(words, STORED, ASM)
    return tl.dot(scaled, low, acc_low * decay[:, None]), tl.dot(scaled, high, acc_high * decay[:, None])
