"""Copies of `warpgroup_triton` to shared memory: queries once, and each tile of the cache."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from ictx.kernels.decode.unpack_triton import INT8_UNIT


@gluon.jit
def put_queries(
    q_ptr, queries_s, rope_s, offsets_s, row_ok, at, BLOCK_M: gl.constexpr, LATENT: gl.constexpr, QUERY: gl.constexpr,
):  # fmt: skip
    """Stores a row block's queries in shared memory as float16, even and odd columns apart; returns each row's power.

    A power of two scales a row's largest query to between 1 and 2: float16 is then as exact as bfloat16.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    word = gl.arange(0, 64, layout=gl.SliceLayout(0, LAYOUT))
    low_0, high_0 = load_pair(q_ptr, at, word, row_ok, QUERY)
    low_1, high_1 = load_pair(q_ptr, at, word + 64, row_ok, QUERY)
    low_2, high_2 = load_pair(q_ptr, at, word + 128, row_ok, QUERY)
    low_3, high_3 = load_pair(q_ptr, at, word + 192, row_ok, QUERY)
    top = gl.maximum(
        gl.maximum(larger(low_0, high_0), larger(low_1, high_1)),
        gl.maximum(larger(low_2, high_2), larger(low_3, high_3)),
    )
    power = (gl.maximum(gl.max(top, 1), 1e-30).to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
    factor = 1.0 / power
    put_query(queries_s, offsets_s, 0, low_0, high_0, factor)
    put_query(queries_s, offsets_s, 1, low_1, high_1, factor)
    put_query(queries_s, offsets_s, 2, low_2, high_2, factor)
    put_query(queries_s, offsets_s, 3, low_3, high_3, factor)
    column = gl.arange(0, 64, layout=gl.SliceLayout(0, LAYOUT))
    rope_s.store(gl.load(q_ptr + (at[:, None] + LATENT + column[None, :]), row_ok[:, None], other=0.0))
    return power


@gluon.jit
def load_pair(q_ptr, at, word, row_ok, QUERY: gl.constexpr):
    """Even and odd columns of queries, as float32; two 16-bit values are loaded as one word."""
    pair = gl.load(
        q_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + ((at // 2)[:, None] + word[None, :]),
        row_ok[:, None], other=0,
    )  # fmt: skip
    low = pair.to(gl.int16).to(QUERY, bitcast=True).to(gl.float32)
    high = (pair >> 16).to(gl.int16).to(QUERY, bitcast=True).to(gl.float32)
    return low, high


@gluon.jit
def larger(a, b):
    """The larger of two magnitudes."""
    return gl.maximum(gl.abs(a), gl.abs(b))


@gluon.jit
def put_query(queries_s, offsets_s, group: gl.constexpr, low, high, factor):
    """Stores a group's even and odd columns in shared memory, and the score of the int8 offset of 128 in the keys."""
    low = (low * factor[:, None]).to(gl.float16)
    high = (high * factor[:, None]).to(gl.float16)
    queries_s.index(2 * group).store(low)
    queries_s.index(2 * group + 1).store(high)
    offsets_s.index(group).store(gl.sum(low.to(gl.float32) + high.to(gl.float32), 1) * (128 * INT8_UNIT))


@gluon.jit
def issue(
    words_s, scales_s, keys_s, slot, tile, block, table_row, length, latent_ptr, scale_ptr, rope_ptr, block_rows,
    block_size, go,
    PAGE: gl.constexpr, LATENT: gl.constexpr, ROPE: gl.constexpr, BLOCK_WORDS: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Starts asynchronous copies of a tile's latents, scales and keys."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    FEW: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    token = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, WIDE))
    token_k = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, ROWS))
    word = gl.arange(0, LATENT // 2, layout=gl.SliceLayout(0, WIDE))
    column = gl.arange(0, ROPE, layout=gl.SliceLayout(0, ROWS))
    scale = gl.arange(0, 4 * BLOCK_N, layout=FEW)
    token_s = scale % BLOCK_N
    origin = tile * BLOCK_N
    left = gl.where(go, length - origin, 0)
    # A zero that is opaque to the compiler, so that sums with it are not kept in registers through the loop.
    none = 8 * gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)
    # In three dimensions, so that a thread's offsets differ by constants: one register, not sixteen.
    DEEP: gl.constexpr = gl.BlockedLayout([16, 1, 8], [1, 1, 32], [1, 4, 1], [2, 1, 0])
    of_thread = gl.arange(0, 16, layout=gl.SliceLayout(1, gl.SliceLayout(2, DEEP)))
    of_warp = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, DEEP)))
    of_row = gl.arange(0, LATENT // 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, DEEP)))
    begin = of_warp[None, :, None] * (LATENT // 2) + of_row[None, None, :] + none
    words = gl.reshape(begin + of_thread[:, None, None] * (4 * (LATENT // 2)), [BLOCK_N, LATENT // 2])
    words = gl.max_contiguous(gl.multiple_of(gl.convert_layout(words, WIDE, assert_trivial=True), [1, 8]), [1, 8])
    keys = token_k[:, None] * ROPE + column[None, :] + none
    if PAGE == 0 or PAGE >= BLOCK_N:
        start = block.to(gl.int64) * block_rows
        inner = origin
        if PAGE > 0:
            inner = origin % PAGE
        at = (latent_ptr + inner * (LATENT // 2) + start * BLOCK_WORDS) + words
        s_at = (scale_ptr + (128 * block_size + inner) + start * (BLOCK_WORDS // 2)) + (
            token_s + scale // BLOCK_N * block_size
        )
        k_at = (rope_ptr + inner * ROPE + 264 * block_size.to(gl.int64) + start * BLOCK_WORDS) + keys
    else:
        at = place(table_row, origin, token, left, block_rows, PAGE, BLOCK_WORDS, LATENT // 2)
        at = latent_ptr + at[:, None] + word[None, :]
        s_at = place(table_row, origin, token_s, left, block_rows, PAGE, BLOCK_WORDS // 2, 1)
        s_at = scale_ptr + 128 * block_size + (s_at + scale // BLOCK_N * block_size)
        k_at = place(table_row, origin, token_k, left, block_rows, PAGE, BLOCK_WORDS, ROPE)
        k_at = rope_ptr + 264 * block_size.to(gl.int64) + k_at[:, None] + column[None, :]
    async_copy.async_copy_global_to_shared(words_s.index(slot), at, words < left * (LATENT // 2))
    async_copy.async_copy_global_to_shared(scales_s.index(slot), s_at, token_s < left)
    async_copy.async_copy_global_to_shared(keys_s.index(slot), k_at, keys < left * ROPE)


@gluon.jit
def place(table_row, origin, token, left, block_rows, PAGE: gl.constexpr, BLOCK: gl.constexpr, WIDTH: gl.constexpr):
    """Offsets of tokens in blocks smaller than a tile; a cache row takes BLOCK elements, a row in the block WIDTH."""
    start = gl.load(table_row + (origin + token) // PAGE, token < left, other=0).to(gl.int64) * block_rows
    return start * BLOCK + (origin + token) % PAGE * WIDTH
