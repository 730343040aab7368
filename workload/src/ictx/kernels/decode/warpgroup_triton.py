"""Absorbed decode with Hopper's warpgroup products (`wgmma`): tokens are rows, heads are columns.

The schedule, the partial results and the arguments are those of `decode.triton`. Only the loop over tokens differs:

- Scores are keys · queriesᵀ and results valuesᵀ · weightsᵀ, so that 64 tokens, or 64 columns of the latent, fill the
  instruction's rows, and 16 heads fill its columns. Queries and weights are small and read from shared memory; words
  of a quantised cache are loaded to registers once for each product and unpacked there.
- No warp holds queries in registers, so that two programs fit on a multiprocessor.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ictx.kernels.decode.join_triton import arrive, ticket_of, wait
from ictx.kernels.decode.schedule_triton import (
    first_of,
    joint_runs,
    owner_of,
    parts_of,
    program_of,
    sequence_tiles,
    span_of,
)
from ictx.kernels.decode.unpack_triton import INT8_UNIT, unpack
from ictx.kernels.decode.warpgroup_copies_triton import issue, put_queries
from ictx.kernels.decode.warpgroup_join_triton import join_share


@gluon.jit(
    do_not_specialize=[
        "q_batch8",
        "q_row8",
        "block_rows",
        "block_size",
        "table_stride",
        "batch",
        "rows",
        "heads",
        "row_blocks",
        "query",
    ],
    do_not_specialize_on_alignment=["table_ptr", "lens_ptr", "lse_ptr", "count_ptr"],
)
def decode(
    q_ptr, latent_ptr, scale_ptr, rope_ptr, table_ptr, lens_ptr, out_ptr, lse_ptr,
    part_ptr, part_lse_ptr, count_ptr, softmax_log2,
    q_batch8, q_row8, block_rows, block_size, table_stride, batch, rows, heads, row_blocks, query,
    LATENT: gl.constexpr, ROPE: gl.constexpr, PAGE: gl.constexpr, STORED: gl.constexpr, ASM: gl.constexpr,
    ROW: gl.constexpr, BLOCK_WORDS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, REDUCE_ALL: gl.constexpr, STAGES: gl.constexpr,
    SCAN: gl.constexpr, COLS: gl.constexpr, PARTS: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Same as `decode.triton.decode`, for a quantised cache and with all programs resident; BLOCK_N is 64."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    ACROSS: gl.constexpr = gl.SliceLayout(0, MMA)
    DOWN: gl.constexpr = gl.SliceLayout(1, MMA)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    WEIGHTS: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_M, 16)
    QUERIES: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0]))
    QUERY: gl.constexpr = q_ptr.dtype.element_ty
    words_s = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_N, LATENT // 2], TILE)
    keys_s = gl.allocate_shared_memory(QUERY, [STAGES, BLOCK_N, 64], TILE)
    scales_s = gl.allocate_shared_memory(gl.float32, [STAGES, 4 * BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    queries_s = gl.allocate_shared_memory(gl.float16, [8, BLOCK_M, 64], TILE)
    rope_s = gl.allocate_shared_memory(QUERY, [BLOCK_M, 64], TILE)
    offsets_s = gl.allocate_shared_memory(gl.float32, [4, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # Separate allocations: the compiler inserts a barrier between two stores to the same one.
    weights_0 = gl.allocate_shared_memory(gl.float16, [1, BLOCK_N, BLOCK_M], WEIGHTS)
    weights_1 = gl.allocate_shared_memory(gl.float16, [1, BLOCK_N, BLOCK_M], WEIGHTS)
    weights_2 = gl.allocate_shared_memory(gl.float16, [1, BLOCK_N, BLOCK_M], WEIGHTS)
    weights_3 = gl.allocate_shared_memory(gl.float16, [1, BLOCK_N, BLOCK_M], WEIGHTS)

    program = gl.program_id(0)
    programs = gl.num_programs(0)
    if DEPENDENT:
        gdc_wait()
    alone = batch == 1
    total = 0
    if alone:
        total = gl.maximum((gl.load(lens_ptr) + BLOCK_N - 1) // BLOCK_N, 1) * row_blocks
    else:
        for start in range(0, batch, SCAN):
            index = start + gl.arange(0, SCAN, layout=LINE)
            total += gl.sum(sequence_tiles(lens_ptr, index, batch, row_blocks, BLOCK_N), 0)
    quota, rest = joint_runs(total, programs)
    tile = gl.minimum(first_of(program, quota, rest), total)
    last = gl.minimum(first_of(program + 1, quota, rest), total)

    sequence = 0
    done = 0
    if not alone:
        before = 0
        for start in range(0, batch, SCAN):
            index = start + gl.arange(0, SCAN, layout=LINE)
            tiles_v = sequence_tiles(lens_ptr, index, batch, row_blocks, BLOCK_N)
            ended = (before + gl.associative_scan(tiles_v, 0, plus) <= tile) & (tiles_v > 0)
            sequence += gl.sum(ended.to(gl.int32), 0)
            done += gl.sum(gl.where(ended, tiles_v, 0), 0)
            before += gl.sum(tiles_v, 0)
    tiles_1 = gl.maximum((gl.load(lens_ptr + gl.minimum(sequence, batch - 1)) + BLOCK_N - 1) // BLOCK_N, 1)
    row_block = (tile - done) // tiles_1
    first = done + row_block * tiles_1

    item = sequence * row_blocks + row_block
    a_ticket, a_span = -1, 0
    b_ticket, b_span = -1, 0

    while tile < last:
        sequence = item // row_blocks
        row_block = item % row_blocks
        length = gl.load(lens_ptr + sequence)
        tiles = gl.maximum((length + BLOCK_N - 1) // BLOCK_N, 1)
        end = gl.minimum(last - first, tiles)
        table_row = table_ptr + sequence.to(gl.int64) * table_stride
        begin = tile - first
        block = sequence
        # All warps must have finished reading the previous item.
        tl.debug_barrier()
        for ahead in gl.static_range(STAGES - 1):
            at = begin + ahead
            if PAGE >= BLOCK_N:
                block = gl.load(table_row + at * BLOCK_N // PAGE, at * BLOCK_N < length, other=0)
            issue(
                words_s, scales_s, keys_s, ahead, at, block, table_row, length, latent_ptr, scale_ptr, rope_ptr,
                block_rows, block_size, at < end, PAGE, LATENT, ROPE, BLOCK_WORDS, BLOCK_N,
            )  # fmt: skip
            async_copy.commit_group()
        if PAGE >= BLOCK_N:
            at = begin + STAGES - 1
            block = gl.load(table_row + at * BLOCK_N // PAGE, at * BLOCK_N < length, other=0)
        # These divisions overlap with the loads of the first rows.
        span = span_of(owner_of(first, quota, rest), owner_of(first + tiles - 1, quota, rest))
        row = row_block * BLOCK_M + gl.arange(0, BLOCK_M, layout=ACROSS)
        row_ok = row < rows
        limit = length - query + 1 + row // heads
        row_q = row_block * BLOCK_M + gl.arange(0, BLOCK_M, layout=QUERIES)
        q_at = row_q * (q_row8 * 8)
        power_q = put_queries(
            q_ptr + sequence.to(gl.int64) * (q_batch8.to(gl.int64) * 8), queries_s, rope_s, offsets_s,
            row_q < rows, q_at, BLOCK_M, LATENT, QUERY,
        )  # fmt: skip
        power = gl.convert_layout(power_q, ACROSS)
        if STORED == "int8":
            power = power / INT8_UNIT
        fence_async_shared()

        zero = gl.zeros([64, BLOCK_M], gl.float32, MMA)
        acc_0l, acc_0h, acc_1l, acc_1h = zero, zero, zero, zero
        acc_2l, acc_2h, acc_3l, acc_3h = zero, zero, zero, zero
        best = gl.full([BLOCK_M], -float("inf"), gl.float32, ACROSS)
        sums = zero
        slot = 0
        filled = STAGES - 1

        for index in range(begin, end):
            async_copy.wait_group(STAGES - 2)
            fence_async_shared()
            token = index * BLOCK_N + gl.arange(0, BLOCK_N, layout=DOWN)
            words = words_s.index(slot)
            # A zero that is opaque to the compiler, so that sums with it are not kept in registers through the loop.
            none = gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)
            score_r = warpgroup_mma(keys_s.index(slot), rope_s.permute((1, 0)), zero, use_acc=False, is_async=True)
            part = score_part(words.slice(0, 64, 1), queries_s, none, zero, STORED, LEFT)
            s_0 = scales_s.index(slot).slice(0, BLOCK_N).load(DOWN)
            score_r, part = warpgroup_mma_wait(0, [score_r, part])
            score = weighted(part, offsets_s.index(0), s_0, STORED, ACROSS)
            part = score_part(words.slice(64, 64, 1), queries_s, none + 2, zero, STORED, LEFT)
            s_1 = scales_s.index(slot).slice(BLOCK_N, BLOCK_N).load(DOWN)
            part = warpgroup_mma_wait(0, [part])
            score += weighted(part, offsets_s.index(1), s_1, STORED, ACROSS)
            part = score_part(words.slice(128, 64, 1), queries_s, none + 4, zero, STORED, LEFT)
            s_2 = scales_s.index(slot).slice(2 * BLOCK_N, BLOCK_N).load(DOWN)
            part = warpgroup_mma_wait(0, [part])
            score += weighted(part, offsets_s.index(2), s_2, STORED, ACROSS)
            part = score_part(words.slice(192, 64, 1), queries_s, none + 6, zero, STORED, LEFT)
            s_3 = scales_s.index(slot).slice(3 * BLOCK_N, BLOCK_N).load(DOWN)
            part = warpgroup_mma_wait(0, [part])
            score += weighted(part, offsets_s.index(3), s_3, STORED, ACROSS)
            score = (score * power[None, :] + score_r) * softmax_log2

            coming = index + STAGES - 1
            issue(
                words_s, scales_s, keys_s, filled, coming, block, table_row, length, latent_ptr, scale_ptr, rope_ptr,
                block_rows, block_size, coming < end, PAGE, LATENT, ROPE, BLOCK_WORDS, BLOCK_N,
            )  # fmt: skip
            async_copy.commit_group()
            if PAGE >= BLOCK_N:
                block = gl.load(table_row + (coming + 1) * BLOCK_N // PAGE, (coming + 1) * BLOCK_N < length, other=0)

            if (index + 1) * BLOCK_N > length - query + 1:
                score = gl.where((token < length)[:, None] & (token[:, None] < limit[None, :]), score, -float("inf"))
            lift = gl.log2(gl.maximum(gl.maximum(gl.maximum(s_0, s_1), gl.maximum(s_2, s_3)), 1e-30)) - 9.0
            top = gl.max(score + lift[:, None], 0)
            # The maximum is updated only if it is exceeded by more than the headroom of the float16 weights.
            if gl.max(top - best, 0) > 6.0:
                new_best = gl.maximum(best, top)
                decay = gl.exp2(best - gl.where(new_best == -float("inf"), 0.0, new_best))
                sums = sums * decay[None, :]
                acc_0l, acc_0h, acc_1l, acc_1h = scaled(acc_0l, acc_0h, acc_1l, acc_1h, decay)
                acc_2l, acc_2h, acc_3l, acc_3h = scaled(acc_2l, acc_2h, acc_3l, acc_3h, decay)
                best = new_best
            # A row without tokens so far has no maximum to subtract.
            weight = gl.exp2(score - gl.where(best == -float("inf"), 0.0, best)[None, :])
            sums += weight
            weights_0.index(none).store((weight * s_0[:, None]).to(gl.float16))
            weights_1.index(none).store((weight * s_1[:, None]).to(gl.float16))
            weights_2.index(none).store((weight * s_2[:, None]).to(gl.float16))
            weights_3.index(none).store((weight * s_3[:, None]).to(gl.float16))
            fence_async_shared()
            tl.debug_barrier()
            low, high = unpack(words.slice(0, 64, 1).permute((1, 0)).load(LEFT), STORED, True)
            acc_0l = warpgroup_mma(low, weights_0.index(none), acc_0l, is_async=True)
            acc_0h = warpgroup_mma(high, weights_0.index(none), acc_0h, is_async=True)
            acc_0l = warpgroup_mma_wait(1, [acc_0l])
            low, high = unpack(words.slice(64, 64, 1).permute((1, 0)).load(LEFT), STORED, True)
            acc_1l = warpgroup_mma(low, weights_1.index(none), acc_1l, is_async=True)
            acc_0h = warpgroup_mma_wait(1, [acc_0h])
            acc_1h = warpgroup_mma(high, weights_1.index(none), acc_1h, is_async=True)
            acc_1l = warpgroup_mma_wait(1, [acc_1l])
            low, high = unpack(words.slice(128, 64, 1).permute((1, 0)).load(LEFT), STORED, True)
            acc_2l = warpgroup_mma(low, weights_2.index(none), acc_2l, is_async=True)
            acc_1h = warpgroup_mma_wait(1, [acc_1h])
            acc_2h = warpgroup_mma(high, weights_2.index(none), acc_2h, is_async=True)
            acc_2l = warpgroup_mma_wait(1, [acc_2l])
            low, high = unpack(words.slice(192, 64, 1).permute((1, 0)).load(LEFT), STORED, True)
            acc_3l = warpgroup_mma(low, weights_3.index(none), acc_3l, is_async=True)
            acc_2h = warpgroup_mma_wait(1, [acc_2h])
            acc_3h = warpgroup_mma(high, weights_3.index(none), acc_3h, is_async=True)
            acc_3l, acc_3h = warpgroup_mma_wait(0, [acc_3l, acc_3h])
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
            filled = gl.where(filled == STAGES - 1, 0, filled + 1)

        async_copy.wait_group(0)
        weight_sum = gl.sum(sums, 0)
        empty = weight_sum == 0.0
        divisor = gl.where(empty, 1.0, weight_sum)
        factor = 1.0 / divisor
        if STORED == "int8":
            factor = factor / INT8_UNIT
        lse2 = gl.where(empty, -float("inf"), best + gl.log2(divisor))
        if parts_of(span) == 1:
            base = sequence.to(gl.int64) * rows + row_block * BLOCK_M
            gl.store(lse_ptr + base + (row - row_block * BLOCK_M), lse2 * 0.6931471805599453, row_ok)
            target = out_ptr + base * LATENT
            put_pair(target, acc_0l, acc_0h, factor, row_ok, LATENT, BLOCK_M, MMA)
            put_pair(target + 128, acc_1l, acc_1h, factor, row_ok, LATENT, BLOCK_M, MMA)
            put_pair(target + 256, acc_2l, acc_2h, factor, row_ok, LATENT, BLOCK_M, MMA)
            put_pair(target + 384, acc_3l, acc_3h, factor, row_ok, LATENT, BLOCK_M, MMA)
        else:
            first_program, parts = program_of(span), parts_of(span)
            place = 2 * program + gl.where(program == first_program, 1, 0)
            part = part_ptr + place.to(gl.int64) * (BLOCK_M * LATENT)
            gl.store(part_lse_ptr + (row - row_block * BLOCK_M) * (2 * programs) + place, lse2, row_ok)
            put_pair(part, acc_0l, acc_0h, factor, row_ok, LATENT, BLOCK_M, MMA)
            put_pair(part + 128, acc_1l, acc_1h, factor, row_ok, LATENT, BLOCK_M, MMA)
            put_pair(part + 256, acc_2l, acc_2h, factor, row_ok, LATENT, BLOCK_M, MMA)
            put_pair(part + 384, acc_3l, acc_3h, factor, row_ok, LATENT, BLOCK_M, MMA)
            tl.debug_barrier()
            ticket = ticket_of(item, arrive(count_ptr + item, program == first_program, parts))
            if a_ticket < 0:
                a_ticket, a_span = ticket, span
            else:
                b_ticket, b_span = ticket, span

        tile = first + end
        if end == tiles:
            first += tiles
            item += 1

    if DEPENDENT:
        gdc_launch_dependents()
    for which in range(2):
        ticket = gl.where(which == 0, a_ticket, b_ticket)
        if ticket >= 0:
            item = ticket // 2
            span = gl.where(which == 0, a_span, b_span)
            first_program, parts = program_of(span), parts_of(span)
            wait(count_ptr + item, ticket)
            join_share(
                out_ptr, lse_ptr, part_ptr, part_lse_ptr, item // row_blocks, item % row_blocks, rows,
                first_program, parts, program - first_program, parts, BLOCK_M, LATENT,
            )  # fmt: skip


@gluon.jit
def plus(a, b):
    """The sum."""
    return a + b


@gluon.jit
def score_part(words, queries_s, at, zero, STORED: gl.constexpr, LEFT: gl.constexpr):
    """Begins one group's products with the queries."""
    low, high = stored_of(words.load(LEFT), STORED)
    part = warpgroup_mma(low, queries_s.index(at).permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(high, queries_s.index(at + 1).permute((1, 0)), part, is_async=True)


@gluon.jit
def stored_of(words, STORED: gl.constexpr):
    """The lower and the upper values of words; those of int8 include the stored offset of 128."""
    if STORED == "int8":
        return unpack_stored(words)
    else:
        return unpack(words, STORED, True)


@gluon.jit
def unpack_stored(words):
    """The lower and the upper byte of each word, as float16, times 2^-24."""
    return (
        gl.inline_asm_elementwise("and.b32 $0, $1, 0x00ff00ff;", "=r,r", [words], gl.float16, True, 2),
        gl.inline_asm_elementwise("prmt.b32 $0, $1, 0, 0x4341;", "=r,r", [words], gl.float16, True, 2),
    )


@gluon.jit
def weighted(part, offset, scale, STORED: gl.constexpr, ACROSS: gl.constexpr):
    """One group's part of the scores."""
    if STORED == "int8":
        return (part - offset.load(ACROSS)[None, :]) * scale[:, None]
    else:
        return part * scale[:, None]


@gluon.jit
def scaled(a, b, c, d, factor):
    """Four accumulators, times each column's factor."""
    return a * factor[None, :], b * factor[None, :], c * factor[None, :], d * factor[None, :]


@gluon.jit
def put_pair(target, low, high, factor, row_ok, LATENT: gl.constexpr, M: gl.constexpr, MMA: gl.constexpr):
    """Stores 128 columns, even and odd ones being the rows of `low` and `high`, times each column's factor."""
    word = gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
    row = gl.arange(0, M, layout=gl.SliceLayout(0, MMA))
    kind: gl.constexpr = target.dtype.element_ty
    low_b = (low * factor[None, :]).to(kind).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    high_b = (high * factor[None, :]).to(kind).to(gl.int16, bitcast=True).to(gl.int32) << 16
    at = target.to(gl.pointer_type(gl.int32), bitcast=True) + (word[:, None] + row[None, :] * (LATENT // 2))
    gl.store(at, low_b | high_b, row_ok[None, :])
