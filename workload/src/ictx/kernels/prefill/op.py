"""`mla_prefill`: new tokens of one sequence attend to its latent cache, which already contains them.

Absorbed: the queries are multiplied into the latent space, and `mla_decode` attends to the latents, eight query
positions at a time. Expanded: keys and values are computed from the cached latents, a part at a time, and the forward
kernel of `mla_attention` accumulates over the parts. A cost model selects the mode.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ictx.kernels import dispatch, layout
from ictx.kernels.attention.launches import forward, widths
from ictx.kernels.attention.op import choice
from ictx.kernels.attention.tuning import attention_config
from ictx.kernels.decode.op import mla_decode, multiprocessors
from ictx.kernels.layout import LATENT, ROW, rows_of
from ictx.kernels.prefill import reference

WORKSPACE = 1 << 29
"""Default limit for expanded keys and values, in bytes."""
SLICE = 8
"""Query positions per sequence of an `mla_decode` call."""

Mode = Literal["auto", "expanded", "absorbed"]


class Cost(NamedTuple):
    """Matrix operations of one chunk, divided by the share of the peak product rate that they reach."""

    expanded: float
    absorbed: float


def cost(new: int, length: int, heads: int, nope: int, rope: int, value: int, multiprocessors: int = 132) -> Cost:
    """Returns the cost of each mode for `new` queries at the end of `length` tokens.

    A query attends to K = length - (new - 1) / 2 keys on average. The expanded kernel takes 128 queries of a head on
    each multiprocessor, so that fewer than R = 128 · multiprocessors / heads queries take as long as R. In operations:

        expanded = 2 · length · heads · 512 · (nope + value) / 0.8
                   + 2 · max(new, R) · K · heads · (nope + rope + value) / 0.6
        absorbed = 2 · new · heads · 512 · (nope + value) / 0.8 + 2 · new · K · heads · (2 · 512 + rope) / 0.12

    The shares of the product rate, 0.8 for plain products and 0.6 and 0.12 for the two attention kernels, are measured
    on an H100 (docs/benchmarks.md).
    """
    keys = length - (new - 1) / 2
    row = 2 * heads * LATENT * (nope + value) / 0.8
    filled = max(new, 128 * multiprocessors / heads)
    return Cost(
        row * length + 2 * filled * keys * heads * (nope + rope + value) / 0.6,
        row * new + 2 * new * keys * heads * (2 * LATENT + rope) / 0.12,
    )


def mla_prefill(
    q: Tensor,
    cache: Tensor,
    length: int,
    w_kv: Tensor,
    scale: float,
    table: Tensor | None = None,
    *,
    stored: str | None = None,
    workspace: int = WORKSPACE,
    mode: Mode = "auto",
) -> Tensor:
    """Attends causally from the last tokens of a sequence to all of its cached tokens.

    Args:
        q: queries [new, heads, nope + 64], the rotated part last; query i is token length - new + i.
        cache: [blocks, block_size, 576] in q's dtype: normed latent, then rotated key; or uint8 [blocks, block_size,
            656] (see `layout`).
        length: cached tokens of the sequence, including the new ones.
        w_kv: projection from latents to keys and values, [heads · (nope + value), 512], head by head, keys first.
        scale: factor on the scores before the softmax, above 0.
        table: blocks of the sequence, int32 [max_blocks]; None if it is in block 0.
        stored: dtype of a quantised latent, int8 or fp8.
        workspace: bytes for expanded keys and values; at least one tile of keys is expanded. In addition, an expanded
            call in several parts holds its result in float32, and an absorbed one its queries in latent space.
        mode: auto selects the cheaper mode by `cost`. Block sizes that are not a power of 2 are always expanded.

    Returns:
        Attended values [new, heads, value] in q's dtype.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    nope, value = _check(q, cache, length, w_kv, table, stored)
    size = cache.shape[1]
    if table is not None and size & (size - 1):
        mode = "expanded"
    if mode == "auto":
        processors = multiprocessors(q.device) if q.device.type == "cuda" else 1
        estimate = cost(q.shape[0], length, q.shape[1], nope, q.shape[2] - nope, value, processors)
        mode = "absorbed" if estimate.absorbed < estimate.expanded else "expanded"
    weight = w_kv.view(q.shape[1], nope + value, LATENT)
    if not q.shape[0]:
        return q.new_empty(0, q.shape[1], value)
    if mode == "absorbed":
        return _absorbed(q, cache, length, weight[:, :nope], weight[:, nope:], scale, table, stored)
    if choice("mla_prefill", q, value).name == "torch":
        return reference.mla_prefill(q, cache, length, w_kv, scale, table, stored, workspace)
    return _expanded(q, cache, length, w_kv, value, scale, table, stored, workspace)


def _check(
    q: Tensor, cache: Tensor, length: int, w_kv: Tensor, table: Tensor | None, stored: str | None
) -> tuple[int, int]:
    """Returns the widths of a head's key without position and of its value, or raises ValueError."""
    rope = ROW - LATENT
    if q.dim() != 3 or q.shape[2] <= rope or not 0 <= q.shape[0] <= length:
        raise ValueError(f"q is {list(q.shape)}: expected [0 to {length}, heads, more than {rope}]")
    nope = q.shape[2] - rope
    if stored:
        layout.check(cache, q.dtype, stored)
    elif cache.dim() != 3 or cache.shape[2] != ROW or cache.dtype != q.dtype or cache.stride(2) != 1:
        raise ValueError(f"cache is {list(cache.shape)} {cache.dtype}: expected [blocks, block_size, {ROW}] {q.dtype}")
    value = w_kv.shape[0] // q.shape[1] - nope
    if w_kv.dim() != 2 or w_kv.shape != (q.shape[1] * (nope + value), LATENT) or value < 1 or w_kv.dtype != q.dtype:
        raise ValueError(f"w_kv is {list(w_kv.shape)} {w_kv.dtype}: expected [heads · ({nope} + value), {LATENT}]")
    held = cache.shape[1] * (1 if table is None else table.shape[0])
    if length > held or (table is not None and (table.dim() != 1 or table.dtype != torch.int32)):
        raise ValueError(f"length is {length}: cache and table (int32 [max_blocks]) hold {held} tokens")
    return nope, value


def _expanded(
    q: Tensor,
    cache: Tensor,
    length: int,
    w_kv: Tensor,
    value: int,
    scale: float,
    table: Tensor | None,
    stored: str | None,
    workspace: int,
) -> Tensor:
    """Attends to expanded keys and values, a part of the cache at a time."""
    new, heads, width = q.shape
    rope = ROW - LATENT
    nope = width - rope
    tiles = attention_config(dispatch.capability(q.device)).forward
    d0, d1 = widths(width)
    split = (d0, d1) == (nope, rope) and value == 1 << (value.bit_length() - 1) >= 16
    row = (heads * (nope + value) + (ROW if table is not None else 0)) * q.element_size()
    if stored:
        # Rows are dequantised in float32, with two copies at a time.
        row += 3 * 4 * ROW
    if not split:
        row += heads * (d0 + d1 + 2 * value) * q.element_size()
    part = max(workspace // row // tiles.block_n, 1) * tiles.block_n
    several = part < length
    out_width = value if split else max(16, 1 << (value - 1).bit_length())
    out = q.new_empty(new, heads, out_width, dtype=torch.float32 if several else q.dtype)
    lse = torch.empty(heads, new, dtype=torch.float32, device=q.device)
    if several:
        out.zero_()
        lse.fill_(-torch.inf)
    q = q if split else F.pad(q, (0, d0 + d1 - width))
    if q.stride(2) != 1 or q.stride(1) % 8 or q.stride(0) % 8 or q.data_ptr() % 16:
        q = q.contiguous()
    for first in range(0, length, part):
        rows = rows_of(cache, table, first, min(first + part, length), stored, q.dtype)
        expanded = F.linear(rows[:, :LATENT], w_kv).view(rows.shape[0], heads, nope + value)
        k_rope = rows[:, None, LATENT:].expand(-1, heads, -1)
        if split:
            # All heads read the same rotated key in place.
            k, v = (expanded[..., :nope], k_rope), expanded[..., nope:]
        else:
            whole = F.pad(torch.cat([expanded[..., :nope], k_rope], -1), (0, d0 + d1 - width))
            k = (whole[..., :d0], whole[..., d0:] if d1 else whole)
            v = F.pad(expanded[..., nope:], (0, out_width - value))
        forward(q, k, v, scale, None, tiles, out, lse, shift=length - new - first, carry=several)
    return out[..., :value].to(q.dtype)


def _absorbed(
    q: Tensor,
    cache: Tensor,
    length: int,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
    table: Tensor | None,
    stored: str | None,
) -> Tensor:
    """Attends to the latents; slices of the queries form a batch over the same sequence."""
    new, heads, _ = q.shape
    nope = w_uk.shape[1]
    q_c = torch.cat([torch.einsum("qhn,hnc->qhc", q[..., :nope], w_uk), q[..., nope:]], -1)
    slices = -(-new // SLICE)
    query = SLICE if slices > 1 else new
    # The first slice is padded at the front with queries whose results are discarded.
    q_c = F.pad(q_c, (0, 0, 0, 0, slices * query - new, 0)).view(slices, query, heads, ROW)
    lens = length - query * torch.arange(slices - 1, -1, -1, dtype=torch.int32, device=q.device)
    # All slices share the blocks of one sequence.
    cache = cache[:1].expand(slices, -1, -1) if table is None else cache
    blocks = None if table is None else table.expand(slices, -1)
    out, _ = mla_decode(q_c, cache, lens, scale, blocks, stored)
    return torch.einsum("qhc,hvc->qhv", out.flatten(0, 1)[slices * query - new :], w_uv)
