"""Absorbed decode over the latent cache: one launch, whose grid does not depend on the length of the context.

Every sequence is cut into tiles of BLOCK_N tokens, and the tiles of the whole batch are distributed in equal runs to
a fixed number of programs (stream-K, arXiv:2301.03598). A program that holds all tiles of a sequence writes the
output itself; otherwise it stores a partial softmax in the workspace. The partials are joined in the same launch:

- REDUCE_ALL: every program with a share of the sequence waits for the others, then joins one slice of the output.
  This requires all programs to be resident at once (a cooperative launch).
- otherwise: the program that arrives last joins all of it. No program waits, so any grid works, and Triton's
  interpreter too.

Shapes: rows are (query position, head) pairs, BLOCK_M of them per program; LATENT and ROPE are the two parts of a
cached row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ictx.kernels.decode.join_triton import arrive, join_share, ticket_of, wait
from ictx.kernels.decode.schedule_triton import first_of, owner_of, parts_of, program_of, sequence_tiles, span_of
from ictx.kernels.decode.tiles_triton import put, put_group, rows_at
from ictx.kernels.decode.unpack_triton import INT8_UNIT, add_score, add_values, halves


@triton.jit(
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
    LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr, STORED: tl.constexpr, ASM: tl.constexpr,
    ROW: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REDUCE_ALL: tl.constexpr, STAGES: tl.constexpr,
    SCAN: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out = softmax(q · cacheᵀ · scale) · latent for every row, causal among the last `query` positions.

    Strides that end in 8 count groups of eight elements, so that the compiler can assume 16-byte alignment for every
    value; `block_rows` is the block stride in rows.
    PAGE is the block size of the paged cache, 0 if each sequence has one block.
    Rows of a quantised cache are not dequantised: a group's scale is applied to its part of the scores and of the
    weights, so that the products use the stored numbers, which are exact in float16.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    if DEPENDENT:
        # The previous launch may still run.
        gdc_wait()
    # Every dependent step before the first load of the cache costs a microsecond; one sequence needs no search.
    alone = batch == 1
    total = 0
    if alone:
        total = tl.maximum((tl.load(lens_ptr) + BLOCK_N - 1) // BLOCK_N, 1) * row_blocks
    else:
        for start in range(0, batch, SCAN):
            total += tl.sum(sequence_tiles(lens_ptr, start + tl.arange(0, SCAN), batch, row_blocks, BLOCK_N), 0)
    quota = total // programs
    rest = total % programs
    tile = first_of(program, quota, rest)
    last = first_of(program + 1, quota, rest)

    # The sequence that holds the first tile: those that end before it are counted, and their tiles summed.
    sequence = 0
    done = 0
    if not alone:
        before = 0
        for start in range(0, batch, SCAN):
            tiles_v = sequence_tiles(lens_ptr, start + tl.arange(0, SCAN), batch, row_blocks, BLOCK_N)
            ended = (before + tl.cumsum(tiles_v, 0) <= tile) & (tiles_v > 0)
            sequence += tl.sum(ended.to(tl.int32), 0)
            done += tl.sum(tl.where(ended, tiles_v, 0), 0)
            before += tl.sum(tiles_v, 0)
    tiles_1 = tl.maximum((tl.load(lens_ptr + tl.minimum(sequence, batch - 1)) + BLOCK_N - 1) // BLOCK_N, 1)
    row_block = (tile - done) // tiles_1
    first = done + row_block * tiles_1

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_g = tl.arange(0, 128)
    offs_h = tl.arange(0, 64)
    offs_r = tl.arange(0, ROPE)
    # One item is one row block of one sequence. At most two are shared with other programs: the first and the last.
    # Their state is packed, because registers are scarce in the loops.
    item = sequence * row_blocks + row_block
    a_ticket, a_span = -1, 0
    b_ticket, b_span = -1, 0

    while tile < last:
        sequence = item // row_blocks
        row_block = item % row_blocks
        length = tl.load(lens_ptr + sequence)
        tiles = tl.maximum((length + BLOCK_N - 1) // BLOCK_N, 1)
        end = tl.minimum(last - first, tiles)
        # These divisions overlap with the loads of the first rows.
        span = span_of(owner_of(first, quota, rest), owner_of(first + tiles - 1, quota, rest))
        row = row_block * BLOCK_M + offs_m
        row_ok = row < rows
        # Row r is query position r // heads; the last position attends to all tokens, the one before it to one less.
        limit = length - query + 1 + row // heads
        # The next tile's block number is loaded one tile ahead; otherwise the compiler's pipeline spends a stage on it.
        table_row = table_ptr + sequence.to(tl.int64) * table_stride
        block = sequence
        if PAGE >= BLOCK_N:
            origin = (tile - first) * BLOCK_N
            block = tl.load(table_row + origin // PAGE, length > 0, other=0)
        q_at = q_ptr + sequence.to(tl.int64) * (q_batch8.to(tl.int64) * 8) + row.to(tl.int64)[:, None] * (q_row8 * 8)
        q_r = tl.load(q_at + LATENT + offs_r[None, :], row_ok[:, None], other=0.0)
        q_0 = tl.load(q_at + offs_g[None, :], row_ok[:, None], other=0.0)
        q_1 = tl.load(q_at + 128 + offs_g[None, :], row_ok[:, None], other=0.0)
        q_2 = tl.load(q_at + 256 + offs_g[None, :], row_ok[:, None], other=0.0)
        q_3 = tl.load(q_at + 384 + offs_g[None, :], row_ok[:, None], other=0.0)
        if STORED != "plain":
            # A power of two scales a row's largest query to between 1 and 2: float16 is then as exact as bfloat16.
            top = tl.maximum(tl.maximum(tl.abs(q_0), tl.abs(q_1)), tl.maximum(tl.abs(q_2), tl.abs(q_3)))
            power = (tl.maximum(tl.max(top.to(tl.float32), 1), 1e-30).to(tl.int32, bitcast=True) & 0x7F800000).to(
                tl.float32, bitcast=True
            )
            q_0l, q_0h = halves(q_0, 1.0 / power, BLOCK_M)
            q_1l, q_1h = halves(q_1, 1.0 / power, BLOCK_M)
            q_2l, q_2h = halves(q_2, 1.0 / power, BLOCK_M)
            q_3l, q_3h = halves(q_3, 1.0 / power, BLOCK_M)
            if STORED == "int8":
                power = power / INT8_UNIT
            acc_0l = tl.zeros([BLOCK_M, 64], tl.float32)
            acc_0h = tl.zeros([BLOCK_M, 64], tl.float32)
            acc_1l = tl.zeros([BLOCK_M, 64], tl.float32)
            acc_1h = tl.zeros([BLOCK_M, 64], tl.float32)
            acc_2l = tl.zeros([BLOCK_M, 64], tl.float32)
            acc_2h = tl.zeros([BLOCK_M, 64], tl.float32)
            acc_3l = tl.zeros([BLOCK_M, 64], tl.float32)
            acc_3h = tl.zeros([BLOCK_M, 64], tl.float32)
        else:
            acc_0 = tl.zeros([BLOCK_M, 128], tl.float32)
            acc_1 = tl.zeros([BLOCK_M, 128], tl.float32)
            acc_2 = tl.zeros([BLOCK_M, 128], tl.float32)
            acc_3 = tl.zeros([BLOCK_M, 128], tl.float32)
        best = tl.full([BLOCK_M], -float("inf"), tl.float32)
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

        for index in tl.range(tile - first, end, num_stages=STAGES):
            token = index * BLOCK_N + offs_n
            ok = token < length
            # Start of the tile: its block in rows of the cache, 64 bits, and its row within the block, 32 bits.
            if PAGE == 0 or PAGE >= BLOCK_N:
                origin = index * BLOCK_N
                start = block.to(tl.int64) * block_rows
                inner = origin
                if PAGE > 0:
                    inner = origin % PAGE
                    block = tl.load(table_row + (origin + BLOCK_N) // PAGE, origin + BLOCK_N < length, other=0)
                at = offs_n
            else:
                start = tl.load(table_row + token // PAGE, ok, other=0).to(tl.int64) * block_rows
                inner = 0
                at = token % PAGE
            if STORED != "plain":
                # A block holds its latents, then its scales, then its keys.
                k_at = rows_at(latent_ptr + inner * (LATENT // 2), start * BLOCK_WORDS, at, LATENT // 2, offs_h)
                s_at = scale_ptr + (128 * block_size + inner) + (start * (BLOCK_WORDS // 2) + at)
                rope_at = rope_ptr + (inner * ROPE + 264 * block_size.to(tl.int64))
                k_r = tl.load(rows_at(rope_at, start * BLOCK_WORDS, at, ROPE, offs_r), ok[:, None], other=0.0)
                w_0 = tl.load(k_at, ok[:, None], other=0)
                w_1 = tl.load(k_at + 64, ok[:, None], other=0)
                w_2 = tl.load(k_at + 128, ok[:, None], other=0)
                w_3 = tl.load(k_at + 192, ok[:, None], other=0)
                s_0 = tl.load(s_at, ok, other=0.0)
                s_1 = tl.load(s_at + block_size, ok, other=0.0)
                s_2 = tl.load(s_at + 2 * block_size, ok, other=0.0)
                s_3 = tl.load(s_at + 3 * block_size, ok, other=0.0)
                score = add_score(tl.zeros([BLOCK_M, BLOCK_N], tl.float32), q_0l, q_0h, w_0, s_0, STORED, ASM)
                score = add_score(score, q_1l, q_1h, w_1, s_1, STORED, ASM)
                score = add_score(score, q_2l, q_2h, w_2, s_2, STORED, ASM)
                score = add_score(score, q_3l, q_3h, w_3, s_3, STORED, ASM)
                score = score * power[:, None] + tl.dot(q_r, tl.trans(k_r))
            else:
                k_at = rows_at(latent_ptr + inner * ROW, start * ROW, at, ROW, offs_g)
                rope_at = rows_at(latent_ptr + (inner * ROW + LATENT), start * ROW, at, ROW, offs_r)
                k_r = tl.load(rope_at, ok[:, None], other=0.0)
                k_0 = tl.load(k_at, ok[:, None], other=0.0)
                k_1 = tl.load(k_at + 128, ok[:, None], other=0.0)
                k_2 = tl.load(k_at + 256, ok[:, None], other=0.0)
                k_3 = tl.load(k_at + 384, ok[:, None], other=0.0)
                # One product would be a chain of 36 dependent instructions; these run in parallel.
                score = tl.dot(q_0, tl.trans(k_0)) + tl.dot(q_1, tl.trans(k_1))
                score += tl.dot(q_2, tl.trans(k_2)) + tl.dot(q_3, tl.trans(k_3))
                score += tl.dot(q_r, tl.trans(k_r))
            seen = ok[None, :] & (token[None, :] < limit[:, None])
            score = tl.where(seen, score * softmax_log2, -float("inf"))
            if STORED != "plain":
                # Weights are multiplied by a token's scales before they are rounded to float16: the largest product
                # of any token and group is scaled to 2^15, so that small products keep their precision.
                lift = tl.log2(tl.maximum(tl.maximum(tl.maximum(s_0, s_1), tl.maximum(s_2, s_3)), 1e-30)) - 15.0
                new_best = tl.maximum(best, tl.max(score + lift[None, :], 1))
            else:
                new_best = tl.maximum(best, tl.max(score, 1))
            # A row without tokens so far has no maximum to subtract.
            anchor = tl.where(new_best == -float("inf"), 0.0, new_best)
            decay = tl.exp2(best - anchor)
            weight = tl.exp2(score - anchor[:, None])
            # Summed over the tokens after the loop, which avoids a synchronisation of warps in each iteration.
            sums = sums * decay[:, None] + weight
            if STORED != "plain":
                p_0 = (weight * s_0[None, :]).to(tl.float16)
                p_1 = (weight * s_1[None, :]).to(tl.float16)
                p_2 = (weight * s_2[None, :]).to(tl.float16)
                p_3 = (weight * s_3[None, :]).to(tl.float16)
                acc_0l, acc_0h = add_values(acc_0l, acc_0h, decay, p_0, w_0, STORED, ASM)
                acc_1l, acc_1h = add_values(acc_1l, acc_1h, decay, p_1, w_1, STORED, ASM)
                acc_2l, acc_2h = add_values(acc_2l, acc_2h, decay, p_2, w_2, STORED, ASM)
                acc_3l, acc_3h = add_values(acc_3l, acc_3h, decay, p_3, w_3, STORED, ASM)
            else:
                w = weight.to(q_r.dtype)
                acc_0 = tl.dot(w, k_0, acc_0 * decay[:, None])
                acc_1 = tl.dot(w, k_1, acc_1 * decay[:, None])
                acc_2 = tl.dot(w, k_2, acc_2 * decay[:, None])
                acc_3 = tl.dot(w, k_3, acc_3 * decay[:, None])
            best = new_best

        weight_sum = tl.sum(sums, 1)
        empty = weight_sum == 0.0
        divisor = tl.where(empty, 1.0, weight_sum)
        factor = 1.0 / divisor
        if STORED == "int8":
            factor = factor / INT8_UNIT
        lse2 = tl.where(empty, -float("inf"), best + tl.log2(divisor))
        if parts_of(span) == 1:
            base = sequence.to(tl.int64) * rows + row_block * BLOCK_M
            target = out_ptr + base * LATENT
            tl.store(lse_ptr + base + offs_m, lse2 * 0.6931471805599453, row_ok)
            if STORED != "plain":
                put_group(target, acc_0l, acc_0h, factor, row_ok, LATENT)
                put_group(target + 128, acc_1l, acc_1h, factor, row_ok, LATENT)
                put_group(target + 256, acc_2l, acc_2h, factor, row_ok, LATENT)
                put_group(target + 384, acc_3l, acc_3h, factor, row_ok, LATENT)
            else:
                put(target, acc_0, factor, row_ok, LATENT)
                put(target + 128, acc_1, factor, row_ok, LATENT)
                put(target + 256, acc_2, factor, row_ok, LATENT)
                put(target + 384, acc_3, factor, row_ok, LATENT)
        else:
            first_program, parts = program_of(span), parts_of(span)
            place = 2 * program + tl.where(program == first_program, 1, 0)
            part = part_ptr + place.to(tl.int64) * (BLOCK_M * LATENT)
            tl.store(part_lse_ptr + offs_m * (2 * programs) + place, lse2, row_ok)
            if STORED != "plain":
                put_group(part, acc_0l, acc_0h, factor, row_ok, LATENT)
                put_group(part + 128, acc_1l, acc_1h, factor, row_ok, LATENT)
                put_group(part + 256, acc_2l, acc_2h, factor, row_ok, LATENT)
                put_group(part + 384, acc_3l, acc_3h, factor, row_ok, LATENT)
            else:
                put(part, acc_0, factor, row_ok, LATENT)
                put(part + 128, acc_1, factor, row_ok, LATENT)
                put(part + 256, acc_2, factor, row_ok, LATENT)
                put(part + 384, acc_3, factor, row_ok, LATENT)
            # All threads must have stored their part before one thread increments the counter.
            tl.debug_barrier()
            if REDUCE_ALL:
                ticket = ticket_of(item, arrive(count_ptr + item, program == first_program, parts))
                if a_ticket < 0:
                    a_ticket, a_span = ticket, span
                else:
                    b_ticket, b_span = ticket, span
            else:
                # The sign bit belongs to REDUCE_ALL.
                if (tl.atomic_add(count_ptr + item, 1, sem="acq_rel") & 0x7FFFFFFF) == parts - 1:
                    tl.debug_barrier()
                    join_share(
                        out_ptr, lse_ptr, part_ptr, part_lse_ptr, sequence, row_block, rows, first_program, parts,
                        0, 1, BLOCK_M, LATENT, True, COLS, PARTS,
                    )  # fmt: skip
                    tl.atomic_add(count_ptr + item, -parts, sem="relaxed")

        tile = first + end
        if end == tiles:
            first += tiles
            item += 1

    if DEPENDENT:
        # The next launch may begin: memory is idle from here on, so that its weights can be loaded.
        gdc_launch_dependents()
    if REDUCE_ALL:
        for which in range(2):
            ticket = tl.where(which == 0, a_ticket, b_ticket)
            if ticket >= 0:
                item = ticket // 2
                span = tl.where(which == 0, a_span, b_span)
                first_program, parts = program_of(span), parts_of(span)
                wait(count_ptr + item, ticket)
                join_share(
                    out_ptr, lse_ptr, part_ptr, part_lse_ptr, item // row_blocks, item % row_blocks, rows,
                    first_program, parts, program - first_program, parts, BLOCK_M, LATENT, False, COLS, PARTS,
                )  # fmt: skip
