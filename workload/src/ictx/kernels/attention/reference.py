"""`mla_attention` in plain PyTorch: the fallback."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES = 1 << 26
"""Scores held at once in `forward` and `backward`: 256 MiB in float32."""


def mla_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bounds: list[int]) -> Tensor:
    """Returns causal attention within each document, [tokens, heads, value width], differentiable.

    Args:
        bounds: first token of each document, in ascending order.
    """
    parts = []
    for first, end in pairwise([0, *bounds, q.shape[0]]):
        if first < end:
            q_1htd, k_1htd, v_1htv = (x[first:end].transpose(0, 1)[None] for x in (q, k, v))
            # PyTorch's fused attention on the CPU, unlike on GPUs, requires values with the width of the keys.
            if q.device.type == "cpu":
                v_1htv = F.pad(v_1htv, (0, max(q.shape[-1] - v.shape[-1], 0)))
            out = F.scaled_dot_product_attention(q_1htd, k_1htd, v_1htv, is_causal=True, scale=scale)
            parts.append(out[0, ..., : v.shape[-1]].transpose(0, 1))
    return torch.cat(parts) if parts else q.new_zeros(0, q.shape[1], v.shape[-1])


def _parts(q: Tensor, k: Tensor, scale: float, first: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields slices of queries and their scores [heads, queries, keys up to the last query], at most `SCORES` each."""
    work = torch.promote_types(q.dtype, torch.float32)
    tokens, heads, _ = q.shape
    part = max(SCORES // (heads * tokens), 1)
    places = torch.arange(tokens, device=q.device)
    for begin in range(0, tokens, part):
        rows = slice(begin, min(begin + part, tokens))
        keys = places[: rows.stop]
        score = torch.einsum("qhd,khd->hqk", q[rows], k[: rows.stop]).to(work) * scale
        hidden = (keys > places[rows, None]) | (keys < first[rows, None])
        yield rows, score.masked_fill_(hidden, -torch.inf)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor) -> tuple[Tensor, Tensor]:
    """Returns attended values [tokens, heads, value width] and the scores' log-sum-exp [heads, tokens]; no gradient.

    Args:
        first: first key that each query attends to, [tokens].
    """
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for rows, score in _parts(q, k, scale, first):
        lse[:, rows] = score.logsumexp(-1)
        weight = (score - lse[:, rows, None]).exp_().to(v.dtype)
        out[rows] = torch.einsum("hqk,khv->qhv", weight, v[: rows.stop])
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, first: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v (FlashAttention-2, arXiv:2307.08691, algorithm 2)."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=lse.dtype), torch.zeros_like(v, dtype=lse.dtype)
    delta_hq1 = (grad.to(lse.dtype) * out).sum(-1).T[..., None]
    for rows, score in _parts(q, k, scale, first):
        seen = slice(rows.stop)
        weight = (score - lse[:, rows, None]).exp_()
        d_weight = torch.einsum("qhv,khv->hqk", grad[rows], v[seen]).to(lse.dtype)
        d_score = (weight * (d_weight - delta_hq1[:, rows]) * scale).to(q.dtype)
        dv[seen] += torch.einsum("hqk,qhv->khv", weight.to(grad.dtype), grad[rows])
        dk[seen] += torch.einsum("hqk,qhd->khd", d_score, q[rows])
        dq[rows] = torch.einsum("hqk,khd->qhd", d_score, k[seen])
    return dq, dk.to(k.dtype), dv.to(v.dtype)
