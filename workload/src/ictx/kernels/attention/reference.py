"""What `mla_attention` computes, in plain PyTorch: the fallback."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


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
