"""Absorbed decode over the latent cache: one launch, whose grid does not depend on the length of the context.

Every sequence is cut into tiles of BLOCK_N tokens, and the tiles of the whole batch are dealt out in equal runs to
a fixed number of programs (stream-K, arXiv:2301.03598). A program that holds all tiles of a sequence writes the
output itself; otherwise it leaves a partial softmax in the workspace. The partials are joined in the same launch:

- REDUCE_ALL: every program that had a share of the sequence waits for the others, then joins one slice of the
  output. This needs all programs resident at once (a cooperative launch).
- otherwise: the program that arrives last joins the whole. Nothing ever waits; any grid and Triton's interpreter
  will do.

Shapes: rows are (query position, head) pairs, BLOCK_M of them a program; LATENT and ROPE are the two parts of a
cached row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def first_of(program, quota, rest):
    """The first tile of a program: the first `rest` programs hold one tile more than `quota`."""
    return program * quota + tl.minimum(program, rest)


@triton.jit
def owner_of(tile, quota, rest):
    """The program that holds a tile."""
    long = rest * (quota + 1)
    return tl.where(tile < long, tile // (quota + 1), rest + (tile - long) // tl.maximum(quota, 1))


@triton.jit
def join(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, row_out, row, col, first_program, parts,
    BLOCK_M: tl.constexpr, LATENT: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Joins `COLS` columns of one row out of the partial softmaxes of `parts` neighbouring programs."""
    cols = col + tl.arange(0, COLS)
    best = -float("inf")
    weight_sum = 0.0
    acc = tl.zeros([COLS], tl.float32)
    for start in range(0, parts, PARTS):
        index = start + tl.arange(0, PARTS)
        ok = index < parts
        # A program has two places: one for a sequence that began before it, one for a sequence that goes on after it.
        slot = 2 * (first_program + index) + tl.where(index == 0, 1, 0)
        at = slot.to(tl.int64) * BLOCK_M + row
        # Other programs wrote these: .cg reads past this multiprocessor's own cache.
        lse = tl.load(part_lse_ptr + at, ok, other=-float("inf"), cache_modifier=".cg")
        values = tl.load(part_ptr + at[:, None] * LATENT + cols[None, :], ok[:, None], other=0.0, cache_modifier=".cg")
        new_best = tl.maximum(best, tl.max(lse, 0))
        anchor = tl.where(new_best == -float("inf"), 0.0, new_best)
        weight = tl.exp2(lse - anchor)
        decay = tl.exp2(best - anchor)
        acc = acc * decay + tl.sum(values * weight[:, None], 0)
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
    BLOCK_M: tl.constexpr, LATENT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Joins this program's share of a row block: whole rows of few parts, or narrow slices of many parts at once."""
    here = tl.minimum(rows - row_block * BLOCK_M, BLOCK_M)
    base = sequence.to(tl.int64) * rows + row_block * BLOCK_M
    if WIDE or parts <= 8:
        join_slices(
            out_ptr, lse_ptr, part_ptr, part_lse_ptr, base, here, first_program, parts, share, shares,
            BLOCK_M, LATENT, LATENT, 8,
        )  # fmt: skip
    else:
        join_slices(
            out_ptr, lse_ptr, part_ptr, part_lse_ptr, base, here, first_program, parts, share, shares,
            BLOCK_M, LATENT, 32, 256,
        )  # fmt: skip


@triton.jit
def wait_and_join(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, arrived_ptr, left_ptr, lens_ptr,
    item, row_blocks, rows, first, program, quota, rest,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LATENT: tl.constexpr,
):  # fmt: skip
    """Waits for every partial of a row block and joins this program's slice; the last to leave clears the counters."""
    sequence = item // row_blocks
    tiles = tl.maximum((tl.load(lens_ptr + sequence) + BLOCK_N - 1) // BLOCK_N, 1)
    first_program = owner_of(first, quota, rest)
    parts = owner_of(first + tiles - 1, quota, rest) - first_program + 1
    while tl.atomic_add(arrived_ptr + item, 0, sem="acquire") < parts:
        pass
    tl.debug_barrier()
    join_share(
        out_ptr, lse_ptr, part_ptr, part_lse_ptr, sequence, item % row_blocks, rows, first_program, parts,
        program - first_program, parts, BLOCK_M, LATENT, False,
    )  # fmt: skip
    if tl.atomic_add(left_ptr + item, 1, sem="acq_rel") == parts - 1:
        tl.atomic_xchg(arrived_ptr + item, 0, sem="relaxed")
        tl.atomic_xchg(left_ptr + item, 0, sem="relaxed")


@triton.jit
def sequence_tiles(lens_ptr, index, batch, row_blocks, BLOCK_N: tl.constexpr):
    """Tiles of each sequence, row blocks together. An empty sequence has one: its output must be written too."""
    length = tl.load(lens_ptr + index, index < batch, other=0)
    tiles = tl.maximum((length + BLOCK_N - 1) // BLOCK_N, 1) * row_blocks
    return tl.where(index < batch, tiles, 0)


@triton.jit
def put(target, acc, divisor, row_ok, LATENT: tl.constexpr):
    """Stores acc / divisor as rows that lie LATENT elements apart."""
    at = tl.arange(0, acc.shape[0])[:, None] * LATENT + tl.arange(0, acc.shape[1])[None, :]
    tl.store(target + at, (acc / divisor[:, None]).to(target.dtype.element_ty), row_ok[:, None])


@triton.jit(
    do_not_specialize=[
        "q_batch8",
        "q_row8",
        "block_rows",
        "table_stride",
        "batch",
        "rows",
        "heads",
        "row_blocks",
        "query",
    ],
    do_not_specialize_on_alignment=["table_ptr", "lens_ptr", "lse_ptr", "arrived_ptr", "left_ptr"],
)
def decode(
    q_ptr, latent_ptr, scale_ptr, rope_ptr, table_ptr, lens_ptr, out_ptr, lse_ptr,
    part_ptr, part_lse_ptr, arrived_ptr, left_ptr, softmax_log2,
    q_batch8, q_row8, block_rows, table_stride, batch, rows, heads, row_blocks, query,
    LATENT: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr, QUANTISED: tl.constexpr,
    LATENT_ROW: tl.constexpr, SCALE_ROW: tl.constexpr, SCALE_AT: tl.constexpr,
    ROPE_ROW: tl.constexpr, ROPE_AT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REDUCE_ALL: tl.constexpr, STAGES: tl.constexpr,
    SCAN: tl.constexpr,
):  # fmt: skip
    """out = softmax(q · cacheᵀ · scale) · latent for every row, causal among the last `query` positions.

    Strides that end in 8 count groups of eight elements, so that the compiler sees 16-byte alignment for every value;
    `block_rows` is the distance of two blocks in rows.
    PAGE is the block size of the paged cache, 0 where each sequence has one block.
    Rows of a quantised cache are never scaled back: a group's scale goes into its part of the scores and of the
    weights, so that the products take the stored numbers, which are exact in both 16-bit formats.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    # Every dependent step before the first load of the cache costs a microsecond: one sequence needs no search.
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
    offs_c = tl.arange(0, LATENT)
    offs_g = tl.arange(0, 128)
    offs_r = tl.arange(0, ROPE)
    # One item is one row block of one sequence. At most two are shared with other programs: the first and the last.
    item = sequence * row_blocks + row_block
    a_item, a_first = -1, 0
    b_item, b_first = -1, 0

    while tile < last:
        sequence = item // row_blocks
        row_block = item % row_blocks
        length = tl.load(lens_ptr + sequence)
        tiles = tl.maximum((length + BLOCK_N - 1) // BLOCK_N, 1)
        end = tl.minimum(last - first, tiles)
        row = row_block * BLOCK_M + offs_m
        row_ok = row < rows
        # Row r is query position r // heads; the last position sees everything, the one before it one token less.
        limit = length - query + 1 + row // heads
        q_at = q_ptr + sequence.to(tl.int64) * (q_batch8.to(tl.int64) * 8) + row.to(tl.int64)[:, None] * (q_row8 * 8)
        q_r = tl.load(q_at + LATENT + offs_r[None, :], row_ok[:, None], other=0.0)
        if QUANTISED:
            q_0 = tl.load(q_at + offs_g[None, :], row_ok[:, None], other=0.0)
            q_1 = tl.load(q_at + 128 + offs_g[None, :], row_ok[:, None], other=0.0)
            q_2 = tl.load(q_at + 256 + offs_g[None, :], row_ok[:, None], other=0.0)
            q_3 = tl.load(q_at + 384 + offs_g[None, :], row_ok[:, None], other=0.0)
            acc_0 = tl.zeros([BLOCK_M, 128], tl.float32)
            acc_1 = tl.zeros([BLOCK_M, 128], tl.float32)
            acc_2 = tl.zeros([BLOCK_M, 128], tl.float32)
            acc_3 = tl.zeros([BLOCK_M, 128], tl.float32)
        else:
            q_c = tl.load(q_at + offs_c[None, :], row_ok[:, None], other=0.0)
            acc = tl.zeros([BLOCK_M, LATENT], tl.float32)
        best = tl.full([BLOCK_M], -float("inf"), tl.float32)
        weight_sum = tl.zeros([BLOCK_M], tl.float32)

        # The number of the next tile's block is read one tile ahead: the compiler's pipeline would spend a stage on it.
        table_row = table_ptr + sequence.to(tl.int64) * table_stride
        block = sequence
        if PAGE >= BLOCK_N:
            block = tl.load(table_row + ((tile - first) * BLOCK_N) // PAGE, length > 0, other=0)
        for index in tl.range(tile - first, end, num_stages=STAGES):
            token = index * BLOCK_N + offs_n
            ok = token < length
            # A 64-bit base for the tile and 32-bit offsets within it take the fewest registers.
            if PAGE == 0 or PAGE >= BLOCK_N:
                origin = index * BLOCK_N
                base = block.to(tl.int64) * block_rows
                if PAGE == 0:
                    base += origin
                else:
                    base += origin % PAGE
                    block = tl.load(table_row + (origin + BLOCK_N) // PAGE, origin + BLOCK_N < length, other=0)
                at = offs_n
            else:
                base = tl.zeros([], tl.int64)
                blocks = tl.load(table_row + token // PAGE, ok, other=0)
                at = blocks.to(tl.int64) * block_rows + token % PAGE
            rope_at = at[:, None] * ROPE_ROW + (ROPE_AT + offs_r[None, :])
            k_r = tl.load(rope_ptr + base * ROPE_ROW + rope_at, ok[:, None], other=0.0)
            if QUANTISED:
                k_at = latent_ptr + base * LATENT_ROW + (at[:, None] * LATENT_ROW + offs_g[None, :])
                s_at = scale_ptr + base * SCALE_ROW + (at * SCALE_ROW + SCALE_AT)
                k_0 = tl.load(k_at, ok[:, None], other=0.0).to(q_r.dtype)
                k_1 = tl.load(k_at + 128, ok[:, None], other=0.0).to(q_r.dtype)
                k_2 = tl.load(k_at + 256, ok[:, None], other=0.0).to(q_r.dtype)
                k_3 = tl.load(k_at + 384, ok[:, None], other=0.0).to(q_r.dtype)
                s_0 = tl.load(s_at, ok, other=0.0)[None, :]
                s_1 = tl.load(s_at + 1, ok, other=0.0)[None, :]
                s_2 = tl.load(s_at + 2, ok, other=0.0)[None, :]
                s_3 = tl.load(s_at + 3, ok, other=0.0)[None, :]
                score = tl.dot(q_0, tl.trans(k_0)) * s_0
                score += tl.dot(q_1, tl.trans(k_1)) * s_1
                score += tl.dot(q_2, tl.trans(k_2)) * s_2
                score += tl.dot(q_3, tl.trans(k_3)) * s_3
                score = tl.dot(q_r, tl.trans(k_r), score)
            else:
                k_at = latent_ptr + base * LATENT_ROW + (at[:, None] * LATENT_ROW + offs_c[None, :])
                k_c = tl.load(k_at, ok[:, None], other=0.0)
                score = tl.dot(q_c, tl.trans(k_c))
                score = tl.dot(q_r, tl.trans(k_r), score)
            seen = ok[None, :] & (token[None, :] < limit[:, None])
            score = tl.where(seen, score * softmax_log2, -float("inf"))
            new_best = tl.maximum(best, tl.max(score, 1))
            # A row that has seen nothing yet has no maximum to subtract.
            anchor = tl.where(new_best == -float("inf"), 0.0, new_best)
            decay = tl.exp2(best - anchor)
            weight = tl.exp2(score - anchor[:, None])
            weight_sum = weight_sum * decay + tl.sum(weight, 1)
            if QUANTISED:
                acc_0 = tl.dot((weight * s_0).to(q_r.dtype), k_0, acc_0 * decay[:, None])
                acc_1 = tl.dot((weight * s_1).to(q_r.dtype), k_1, acc_1 * decay[:, None])
                acc_2 = tl.dot((weight * s_2).to(q_r.dtype), k_2, acc_2 * decay[:, None])
                acc_3 = tl.dot((weight * s_3).to(q_r.dtype), k_3, acc_3 * decay[:, None])
            else:
                acc = tl.dot(weight.to(k_c.dtype), k_c, acc * decay[:, None])
            best = new_best

        empty = weight_sum == 0.0
        divisor = tl.where(empty, 1.0, weight_sum)
        lse2 = tl.where(empty, -float("inf"), best + tl.log2(divisor))
        first_program = owner_of(first, quota, rest)
        parts = owner_of(first + tiles - 1, quota, rest) - first_program + 1
        if parts == 1:
            base = sequence.to(tl.int64) * rows + row_block * BLOCK_M
            target = out_ptr + base * LATENT
            tl.store(lse_ptr + base + offs_m, lse2 * 0.6931471805599453, row_ok)
            if QUANTISED:
                put(target, acc_0, divisor, row_ok, LATENT)
                put(target + 128, acc_1, divisor, row_ok, LATENT)
                put(target + 256, acc_2, divisor, row_ok, LATENT)
                put(target + 384, acc_3, divisor, row_ok, LATENT)
            else:
                put(target, acc, divisor, row_ok, LATENT)
        else:
            base = (2 * program + tl.where(program == first_program, 1, 0)).to(tl.int64) * BLOCK_M
            part = part_ptr + base * LATENT
            tl.store(part_lse_ptr + base + offs_m, lse2, row_ok)
            if QUANTISED:
                put(part, acc_0, divisor, row_ok, LATENT)
                put(part + 128, acc_1, divisor, row_ok, LATENT)
                put(part + 256, acc_2, divisor, row_ok, LATENT)
                put(part + 384, acc_3, divisor, row_ok, LATENT)
            else:
                put(part, acc, divisor, row_ok, LATENT)
            # Every thread's part is written before the one thread that counts says so.
            tl.debug_barrier()
            if REDUCE_ALL:
                tl.atomic_add(arrived_ptr + item, 1, sem="release")
                if a_item < 0:
                    a_item, a_first = item, first
                else:
                    b_item, b_first = item, first
            else:
                if tl.atomic_add(arrived_ptr + item, 1, sem="acq_rel") == parts - 1:
                    tl.debug_barrier()
                    join_share(
                        out_ptr, lse_ptr, part_ptr, part_lse_ptr, sequence, row_block, rows, first_program, parts,
                        0, 1, BLOCK_M, LATENT, True,
                    )  # fmt: skip
                    tl.atomic_xchg(arrived_ptr + item, 0, sem="relaxed")

        tile = first + end
        if end == tiles:
            first += tiles
            item += 1

    if REDUCE_ALL:
        for turn in range(2):
            shared = tl.where(turn == 0, a_item, b_item)
            if shared >= 0:
                wait_and_join(
                    out_ptr, lse_ptr, part_ptr, part_lse_ptr, arrived_ptr, left_ptr, lens_ptr,
                    shared, row_blocks, rows, tl.where(turn == 0, a_first, b_first), program, quota, rest,
                    BLOCK_M, BLOCK_N, LATENT,
                )  # fmt: skip
