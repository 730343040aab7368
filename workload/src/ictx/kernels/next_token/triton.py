"""Work of a decode step before its first layer and after its last product, fused into few launches.

As in `products.triton`, a launch may begin while the previous one still runs (DEPENDENT).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


# The number of tokens and the alignment of the lists must not cause recompilation.
@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["cos_ptr", "sin_ptr", "slot_ptr"])
def begin(
    token_ptr, length_ptr, first_ptr, embedding_ptr, cos_ptr, sin_ptr, slot_ptr,
    x_ptr, cos_out_ptr, sin_out_ptr, slot_out_ptr, count,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PAIRS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Loads the embedding, rotation and slot of a sequence's newest token; increments its length. One program each."""
    sequence = tl.program_id(0)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(length_ptr + sequence)
    at = (sequence * count + length - tl.load(first_ptr + sequence)).to(tl.int64)
    token = tl.load(token_ptr + sequence)
    column, pair = tl.arange(0, PADDED), tl.arange(0, PAIRS)
    ok = column < WIDTH
    x = tl.load(embedding_ptr + token * WIDTH + column, ok, other=0.0)
    tl.store(x_ptr + sequence * WIDTH + column, x, ok)
    tl.store(cos_out_ptr + sequence * PAIRS + pair, tl.load(cos_ptr + at * PAIRS + pair))
    tl.store(sin_out_ptr + sequence * PAIRS + pair, tl.load(sin_ptr + at * PAIRS + pair))
    tl.store(slot_out_ptr + sequence, tl.load(slot_ptr + at))
    # All threads must have read the length before it is overwritten.
    tl.debug_barrier()
    tl.store(length_ptr + sequence, length + 1)


@triton.jit
def best_of_part(
    logits_ptr, value_ptr, index_ptr, vocabulary, parts,
    PART: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The largest logit, and the first index that has it, in PART of a sequence's vocabulary."""
    part, sequence = tl.program_id(0), tl.program_id(1)
    column = part * PART + tl.arange(0, PART)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    logits = tl.load(logits_ptr + sequence.to(tl.int64) * vocabulary + column, column < vocabulary, other=-float("inf"))
    value, index = tl.max(logits.to(tl.float32), 0, return_indices=True)
    tl.store(value_ptr + sequence * parts + part, value)
    # If all of them are NaN, the index may be past the end, where the embedding has no row.
    tl.store(index_ptr + sequence * parts + part, tl.minimum(part * PART + index, vocabulary - 1))


@triton.jit
def best_of_all(
    value_ptr, index_ptr, token_ptr, parts, PADDED: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    """The token of the largest part, the first one if tied. One program per sequence."""
    sequence = tl.program_id(0)
    part = tl.arange(0, PADDED)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(value_ptr + sequence * parts + part, part < parts, other=-float("inf"))
    best = tl.minimum(tl.argmax(values, 0), parts - 1)
    tl.store(token_ptr + sequence, tl.load(index_ptr + sequence * parts + best).to(tl.int64))
