"""Attention within each of several concatenated sequences, with its log-sum-exp."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ictx.kernels import dispatch
from ictx.kernels.attention.launches import forward, readable, widths
from ictx.kernels.attention.op import choice
from ictx.kernels.attention.tuning import attention_config

WORKSPACE = 1 << 28
"""Maximum bytes of scores and weights in PyTorch, unless a single query needs more."""


def attend_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bounds: list[int],
    k_bounds: list[int],
    scale: float,
    *,
    causal: bool,
    workspace: int = WORKSPACE,
) -> tuple[Tensor, Tensor]:
    """Attends within each sequence: softmax(q · kᵀ · scale) · v.

    Uses the forward kernel of `mla_attention` where it is supported, else PyTorch. Scores and their softmax are float32
    (float64 if q is).

    Args:
        q: queries [queries, heads, width].
        k: keys [keys, heads, width] in q's dtype.
        v: values [keys, heads, value width] in q's dtype.
        q_bounds: first query of each sequence, and the end of the last.
        k_bounds: the same for the keys; every sequence that has queries has keys.
        causal: whether query i of a sequence attends only to its keys 0 to i.
        workspace: maximum bytes of scores and weights.

    Returns:
        Attended values [queries, heads, value width] in q's dtype, and the natural log-sum-exp of the scaled scores,
        float32 [heads, queries].
    """
    width, value = q.shape[-1], v.shape[-1]
    whole = sum(widths(width)) == width and value == max(16, 1 << (value - 1).bit_length())
    if whole and choice("mla_attention", q, value).name == "triton":
        return _by_kernel(q, k, v, q_bounds, k_bounds, scale, causal)
    heads = q.shape[1]
    out = q.new_empty(q.shape[0], heads, v.shape[-1])
    lse = torch.empty(heads, q.shape[0], dtype=torch.float32, device=q.device)
    for (q_first, q_end), (k_first, k_end) in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True):
        keys, values = (x[k_first:k_end].transpose(0, 1) for x in (k, v))
        step = max(workspace // (8 * heads * max(k_end - k_first, 1)), 1)
        for first in range(q_first, q_end, step):
            end = min(first + step, q_end)
            seen = end - q_first if causal else k_end - k_first
            score = _scores(q[first:end].transpose(0, 1), keys[:, :seen]) * scale
            if causal:
                later = torch.ones(end - first, seen, dtype=torch.bool, device=q.device).triu(first - q_first + 1)
                score.masked_fill_(later, -torch.inf)
            total = score.logsumexp(-1, keepdim=True)
            out[first:end] = torch.matmul((score - total).exp().to(v.dtype), values[:, :seen]).transpose(0, 1)
            lse[:, first:end] = total.squeeze(-1)
    return out, lse


def _by_kernel(
    q: Tensor, k: Tensor, v: Tensor, q_bounds: list[int], k_bounds: list[int], scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Launches the kernel for each sequence."""
    tiles = attention_config(dispatch.capability(q.device)).forward
    q, k, v = readable(q), readable(k), readable(v)
    first_part = widths(q.shape[-1])[0]
    parts = (k[..., :first_part], k[..., first_part:] if first_part < q.shape[-1] else k)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    for (q_first, q_end), (k_first, k_end) in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True):
        if q_end > q_first:
            k_0, k_1 = (part[k_first:k_end] for part in parts)
            found = lse.new_empty(q.shape[1], q_end - q_first)
            # Query i is at the position of key i, or after all keys.
            shift = 0 if causal else k_end - k_first
            rows = slice(q_first, q_end)
            forward(q[rows], (k_0, k_1), v[k_first:k_end], scale, None, tiles, out[rows], found, shift=shift)
            lse[:, rows] = found
    return out, lse


def _scores(q_hqd: Tensor, k_hkd: Tensor) -> Tensor:
    """Returns q · kᵀ, accumulated and returned in float32 (float64 if q is)."""
    if q_hqd.dtype in (torch.float32, torch.float64):
        return torch.matmul(q_hqd, k_hkd.mT)
    if q_hqd.device.type == "cuda":
        # Rounding a score of 100 to 16 bits would change its weight by up to 3 %.
        return torch.bmm(q_hqd, k_hkd.mT, out_dtype=torch.float32)
    return torch.matmul(q_hqd.float(), k_hkd.mT.float())
