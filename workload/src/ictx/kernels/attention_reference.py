"""What `mla_attention` and `mla_prefill` compute, in plain PyTorch: the fallbacks."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ictx.kernels.layout import LATENT, ROW


def mla_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: list[int]) -> Tensor:
    """Returns causal attention within each document, [tokens, heads, value width], differentiable.

    Args:
        bounds: first token of each document, in ascending order.
    """
    parts = []
    for first, end in pairwise([0, *bounds, q.shape[0]]):
        if first < end:
            q_1htd, k_1htd, v_1htv = (x[first:end].transpose(0, 1)[None] for x in (q, k, v))
            # PyTorch's fused attention on the CPU, unlike on GPUs, wants values as wide as keys.
            if q.device.type == "cpu":
                v_1htv = F.pad(v_1htv, (0, max(q.shape[-1] - v.shape[-1], 0)))
            out = F.scaled_dot_product_attention(q_1htd, k_1htd, v_1htv, is_causal=True, scale=scale)
            parts.append(out[0, ..., : v.shape[-1]].transpose(0, 1))
    return torch.cat(parts) if parts else q.new_zeros(0, q.shape[1], v.shape[-1])


def mla_prefill(
    q: Tensor,
    cache: Tensor,
    length: int,
    w_kv: Tensor,
    scale: float,
    table: Tensor | None,
    stored: str | None,
    workspace: int,
) -> Tensor:
    """Returns attended values [new, heads, value]; see `prefill.mla_prefill`.

    Running maximum, sum and result are float32 (float64 where q is) and rescaled as larger scores come
    (arXiv:2205.14135), so that any division into parts gives the same.
    """
    from ictx.kernels.prefill import rows_of

    new, heads, width = q.shape
    nope = width - (ROW - LATENT)
    value = w_kv.shape[0] // heads - nope
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    limit = torch.arange(length - new, length, device=q.device)[:, None]
    best = torch.full((heads, new, 1), -torch.inf, dtype=work, device=q.device)
    total, out = torch.zeros_like(best), torch.zeros(heads, new, value, dtype=work, device=q.device)
    row = heads * ((nope + value + width) * q.element_size() + 2 * new * work.itemsize)
    part = max(workspace // row, 16)
    for first in range(0, length, part):
        rows = rows_of(cache, table, first, min(first + part, length), stored, q.dtype)
        expanded = F.linear(rows[:, :LATENT], w_kv).view(len(rows), heads, nope + value)
        k_nope, v = expanded[..., :nope], expanded[..., nope:]
        k = torch.cat([k_nope, rows[:, None, LATENT:].expand(-1, heads, -1)], -1)
        score = torch.einsum("qhd,khd->hqk", q, k).to(work) * scale
        score.masked_fill_(torch.arange(first, first + len(rows), device=q.device) > limit, -torch.inf)
        # Key 0 is in the first part: every query sees it.
        higher = torch.maximum(best, score.amax(-1, keepdim=True))
        weight, keep = torch.exp(score - higher), torch.exp(best - higher)
        total = total * keep + weight.sum(-1, keepdim=True)
        out = out * keep + torch.einsum("hqk,khv->hqv", weight.to(v.dtype), v).to(work)
        best = higher
    return (out / total).transpose(0, 1).to(q.dtype)
