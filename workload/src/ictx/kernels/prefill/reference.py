"""`mla_prefill` in plain PyTorch: the fallback."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ictx.kernels.layout import LATENT, ROW, rows_of


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
    """Returns attended values [new, heads, value]; see `op.mla_prefill`.

    Running maximum, sum and result are float32 (float64 if q is), rescaled when a larger score appears
    (arXiv:2205.14135), so that the result does not depend on the division into parts.
    """
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
        # Key 0 is in the first part and visible to every query, so the maximum is finite.
        higher = torch.maximum(best, score.amax(-1, keepdim=True))
        weight, keep = torch.exp(score - higher), torch.exp(best - higher)
        total = total * keep + weight.sum(-1, keepdim=True)
        out = out * keep + torch.einsum("hqk,khv->hqv", weight.to(v.dtype), v).to(work)
        best = higher
    return (out / total).transpose(0, 1).to(q.dtype)
