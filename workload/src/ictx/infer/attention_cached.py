"""Attention to a cache: with the kernels if they support the inputs, else in PyTorch, a part of the cache at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ictx.infer.storage import LatentStorage
from ictx.kernels import dispatch
from ictx.kernels.attention.op import choice
from ictx.kernels.decode.op import MOST_HEADS, MOST_QUERIES, mla_decode
from ictx.kernels.prefill.op import SLICE, mla_prefill
from ictx.kernels.rope_cache.op import mla_rope_cache
from ictx.model.attention import LatentAttention, Mode
from ictx.model.cache import Slots, quantisable
from ictx.model.config import LATENT_NORM_EPS
from ictx.model.rope import Rotations

KEYS_AT_ONCE = 2048
"""Cached tokens expanded or scored at a time; bounds the workspace."""


def kernel_takes(operation: str, x: Tensor, cache: LatentStorage) -> bool:
    """Whether a kernel supports inputs like `x` and the cache's layout; these kernels have no gradient."""
    return (
        not torch.is_grad_enabled()
        and x.dtype == cache.dtype
        and quantisable(cache.config)
        and dispatch.choose(operation, x.device, x.dtype, stored=cache.stored).name == "triton"
    )


def attend(
    attention: LatentAttention,
    cache: LatentStorage,
    layer: int,
    q_nope: Tensor,
    q_rope: Tensor,
    new_bse: Tensor,
    rope: Rotations,
    slots: Slots,
    mode: Mode,
) -> Tensor:
    """Adds new tokens to a layer of the cache and attends to it; see `model.attention.Cache`."""
    if kernel_takes("mla_rope_cache", new_bse, cache):
        _write(attention, new_bse, rope, cache, layer, slots)
    else:
        cache.write(layer, torch.cat(attention.normed(new_bse, rope), -1), slots)
    if _kernel_prefills(attention, q_nope, cache, slots):
        return _prefill(attention, torch.cat([q_nope, q_rope], -1), cache, layer, slots, mode)
    absorbed = mode == "absorbed" or (mode == "auto" and _absorbing_is_cheaper(attention, q_nope.shape[1]))
    return (_absorbed if absorbed else _expanded)(attention, q_nope, q_rope, cache, layer, slots)


def _write(
    attention: LatentAttention, new_bse: Tensor, rope: Rotations, cache: LatentStorage, layer: int, slots: Slots
) -> None:
    """Writes normed latents and rotated keys to the cache with `mla_rope_cache`."""
    places_bs = cache.places(slots.positions_bs)
    if slots.real_bs is not None:
        places_bs = places_bs.masked_fill(~slots.real_bs, -1)
    cos, sin = (x.expand(*places_bs.shape, 1, -1).flatten(0, 2).contiguous() for x in rope)
    gain, eps = attention.kv_a_layernorm.weight, LATENT_NORM_EPS
    entries = cache.layers[layer]
    mla_rope_cache(new_bse.flatten(0, 1), gain, cos, sin, places_bs.flatten(), entries, eps, cache.stored)


def _absorbing_is_cheaper(attention: LatentAttention, queries: int) -> bool:
    """Whether absorbed attention of that many queries costs less than expanding each key and value."""
    config = attention.config
    longer = 2 * config.kv_lora_rank - config.qk_nope_head_dim - config.v_head_dim
    return queries * longer < config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)


def _kernel_prefills(attention: LatentAttention, q_nope: Tensor, cache: LatentStorage, slots: Slots) -> bool:
    """Whether `mla_prefill` has a kernel for this pass: several tokens per sequence, no padding and no gradient."""
    config = attention.config
    return (
        q_nope.shape[1] > SLICE
        and slots.real_bs is None
        and not torch.is_grad_enabled()
        and cache.dtype == q_nope.dtype
        and quantisable(config)
        and choice("mla_prefill", q_nope, config.v_head_dim).name == "triton"
    )


def _prefill(
    attention: LatentAttention, q_bshd: Tensor, cache: LatentStorage, layer: int, slots: Slots, mode: Mode
) -> Tensor:
    """Attends to the cache with `mla_prefill`; returns (batch, sequence, heads, v_head_dim)."""
    weight, scale = attention.kv_b_proj.weight, attention.config.softmax_scale
    rows = []
    for row, q in enumerate(q_bshd):
        entries, table = cache.sequence(layer, row)
        rows.append(mla_prefill(q, entries, slots.lengths[row], weight, scale, table, stored=cache.stored, mode=mode))
    return torch.stack(rows)


def _expanded(
    attention: LatentAttention, q_nope: Tensor, q_rope: Tensor, cache: LatentStorage, layer: int, slots: Slots
) -> Tensor:
    """Expands and attends to the cache a part at a time; returns (batch, sequence, heads, v_head_dim)."""
    q_bhsd = torch.cat([q_nope, q_rope], -1).transpose(1, 2)
    rank = attention.config.kv_lora_rank

    def parts() -> Iterable[tuple[int, Tensor, Tensor]]:
        for start, entries in cache.read(layer, slots.longest, KEYS_AT_ONCE):
            entries = entries.to(q_bhsd.dtype)
            k, v = attention.keys_values(entries[..., :rank], entries[..., rank:])
            yield start, k.transpose(1, 2), v.transpose(1, 2)

    return attend_in_parts(q_bhsd, parts(), slots, attention.config.softmax_scale).transpose(1, 2)


def _absorbed(
    attention: LatentAttention, q_nope: Tensor, q_rope: Tensor, cache: LatentStorage, layer: int, slots: Slots
) -> Tensor:
    """Attends to the cached latents; returns (batch, sequence, heads, v_head_dim)."""
    config = attention.config
    weight = attention.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
    w_uk, w_uv = weight[:, : config.qk_nope_head_dim], weight[:, config.qk_nope_head_dim :]
    q_latent = torch.einsum("bshn,hnc->bshc", q_nope, w_uk)
    out_bshc = attend_to_latents(torch.cat([q_latent, q_rope], -1), cache, layer, slots, config.softmax_scale)
    return torch.einsum("bshc,hvc->bshv", out_bshc, w_uv)


def attend_to_latents(q_bshe: Tensor, cache: LatentStorage, layer: int, slots: Slots, scale: float) -> Tensor:
    """Returns softmax(q·eᵀ·scale)·c over the cached entries e = (c, k_rope), of shape (batch, sequence, heads, latent).

    All heads share the entries. Uses `mla_decode` if it supports the inputs.

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
    # Flatten tokens and heads to queries of one head: (batch, 1, sequence · heads, width).
    q = q_bshe.reshape(batch, 1, sequence * heads, width)

    def parts() -> Iterable[tuple[int, Tensor, Tensor]]:
        for start, entries in cache.read(layer, slots.longest, KEYS_AT_ONCE):
            entries = entries.to(q.dtype)[:, None]
            yield start, entries, entries[..., :rank]

    return attend_in_parts(q, parts(), slots, scale, heads).reshape(batch, sequence, heads, rank)


def attend_in_parts(
    q_bhqd: Tensor, parts: Iterable[tuple[int, Tensor, Tensor]], slots: Slots, scale: float, repeat: int = 1
) -> Tensor:
    """Returns causal attention over keys given in parts, of shape (batch, heads, queries, value width).

    Running maximum, sum and result are float32, rescaled when a larger score appears (arXiv:2205.14135), so that the
    result does not depend on the division into parts.

    Args:
        parts: first position, keys and values (batch, heads or 1, tokens, width) of each part.
        repeat: number of queries per position of `slots`.
    """
    places = slots.positions_bs.repeat_interleave(repeat, 1)[:, None, :, None]
    highest: Tensor | None = None
    total, out = torch.zeros((), device=q_bhqd.device), torch.zeros((), device=q_bhqd.device)
    q_bhqd = q_bhqd * scale
    # The single newest token attends to all keys: no mask.
    single = slots.positions_bs.shape[1] == 1 and slots.real_bs is None and slots.positions_bs.shape[0] == 1
    for start, keys, values in parts:
        scores = torch.matmul(q_bhqd, keys.transpose(-1, -2)).float()
        if not single:
            tokens = torch.arange(start, start + keys.shape[2], device=scores.device)
            scores = scores.masked_fill(tokens > places, -torch.inf)
        peak = scores.amax(-1, keepdim=True)
        if highest is None:
            # Position 0 is in the first part and visible to every query, so the maximum is finite.
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
