"""Attention to a cache: by `mla_decode` where it can, and by PyTorch a part of the cache at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ictx.kernels import dispatch
from ictx.kernels.decode.op import MOST_HEADS, MOST_QUERIES, mla_decode
from ictx.model.cache import LatentCache, Slots, quantisable

KEYS_AT_ONCE = 2048
"""Cached tokens that are expanded or scored at a time: what bounds the workspace."""


def kernel_takes(operation: str, x: Tensor, cache: LatentCache) -> bool:
    """Whether a kernel over the cache's own layout runs for inputs like `x`: none of them has a gradient."""
    return (
        not torch.is_grad_enabled()
        and x.dtype == cache.dtype
        and quantisable(cache.config)
        and dispatch.choose(operation, x.device, x.dtype, stored=cache.stored).name == "triton"
    )


def attend_to_latents(q_bshe: Tensor, cache: LatentCache, layer: int, slots: Slots, scale: float) -> Tensor:
    """Returns softmax(q·eᵀ·scale)·c over the cached entries e = (c, k_rope), of shape (batch, sequence, heads, latent).

    All heads share the entries. `mla_decode` takes over where it can.

    Args:
        q_bshe: absorbed queries and rotated parts, (batch, sequence, heads, cache_width).
    """
    rank = cache.config.kv_lora_rank
    batch, sequence, heads, width = q_bshe.shape
    decodes = sequence <= MOST_QUERIES and heads <= MOST_HEADS and slots.real_bs is None
    if decodes and cache.direct is not None and kernel_takes("mla_decode", q_bshe, cache):
        entries, lens = cache.layers[layer], slots.lengths_b.to(torch.int32)
        table = None if cache.direct else cache.block_tables
        return mla_decode(q_bshe.contiguous(), entries, lens, scale, table, cache.stored)[0]
    # Heads and tokens are queries alike: (batch, 1, sequence · heads, width).
    q = q_bshe.reshape(batch, 1, sequence * heads, width)

    def parts() -> Iterable[tuple[int, Tensor, Tensor]]:
        for start, entries in cache.read(layer, slots.longest, KEYS_AT_ONCE):
            entries = entries.to(q.dtype)[:, None]
            yield start, entries, entries[..., :rank]

    return attend_in_parts(q, parts(), slots, scale, heads).reshape(batch, sequence, heads, rank)


def attend_in_parts(
    q_bhqd: Tensor, parts: Iterable[tuple[int, Tensor, Tensor]], slots: Slots, scale: float, repeat: int = 1
) -> Tensor:
    """Returns causal attention over keys that come a part at a time, of shape (batch, heads, queries, value width).

    Running maximum, sum and result are float32 and rescaled as larger scores come (arXiv:2205.14135), so that any
    division into parts gives the same.

    Args:
        parts: first position, keys and values (batch, heads or 1, tokens, width) of each part.
        repeat: queries that stand at each position of `slots`.
    """
    places = slots.positions_bs.repeat_interleave(repeat, 1)[:, None, :, None]
    highest: Tensor | None = None
    total, out = torch.zeros((), device=q_bhqd.device), torch.zeros((), device=q_bhqd.device)
    q_bhqd = q_bhqd * scale
    # Every query sees the part's keys when the first of them comes after the last key.
    single = slots.positions_bs.shape[1] == 1 and slots.real_bs is None and slots.positions_bs.shape[0] == 1
    for start, keys, values in parts:
        scores = torch.matmul(q_bhqd, keys.transpose(-1, -2)).float()
        if not single:
            tokens = torch.arange(start, start + keys.shape[2], device=scores.device)
            scores = scores.masked_fill(tokens > places, -torch.inf)
        peak = scores.amax(-1, keepdim=True)
        if highest is None:
            # Position 0 is in the first part: every query sees a key there.
            weights = torch.exp(scores - peak)
            total, out = weights.sum(-1, keepdim=True), torch.matmul(weights.to(values.dtype), values).float()
            highest = peak
            continue
        new = torch.maximum(highest, peak)
        weights, keep = torch.exp(scores - new), torch.exp(highest - new)
        total = total * keep + weights.sum(-1, keepdim=True)
        out = out * keep + torch.matmul(weights.to(values.dtype), values).float()
        highest = new
    return (out / total).to(q_bhqd.dtype)
