"""`mla_decode` in plain PyTorch: the fallback, and the reference in the kernel's tests."""

from __future__ import annotations

import torch
from torch import Tensor

from ictx.kernels.layout import LATENT, dequantise


def mla_decode(
    q: Tensor, cache: Tensor, lens: Tensor, scale: float, table: Tensor | None, stored: str | None
) -> tuple[Tensor, Tensor]:
    """Returns the attended latents [batch, query, heads, 512] and the scores' log-sum-exp [batch, query, heads].

    Computes in float32 (float64 if `q` is), one sequence at a time, so that memory use depends on the longest only.
    """
    batch, query, heads, _ = q.shape
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(batch, query, heads, LATENT, dtype=work, device=q.device)
    lse = torch.full((batch, query, heads), -torch.inf, dtype=work, device=q.device)
    block_size = cache.shape[1]
    for index, length in enumerate(lens.tolist()):
        if not length:
            continue
        blocks = cache[index : index + 1] if table is None else cache[table[index, : -(-length // block_size)].long()]
        blocks = dequantise(blocks, stored, q.dtype) if stored else blocks
        rows = blocks.flatten(0, 1)[:length]
        rows = rows.to(work)
        score = torch.einsum("qhd,td->qht", q[index].to(work), rows) * scale
        token = torch.arange(length, device=q.device)
        # The last query position is the newest cached token and attends to all; the one before it to one token less.
        limit = length - query + torch.arange(query, device=q.device)
        score = score.masked_fill(token[None, None, :] > limit[:, None, None], -torch.inf)
        lse[index] = score.logsumexp(-1)
        out[index] = torch.einsum("qht,td->qhd", score.softmax(-1).nan_to_num(0.0), rows[:, :LATENT])
    return out.to(q.dtype), lse.to(torch.float64 if work == torch.float64 else torch.float32)
