"""Attention's forward and backward pass as two functions, for operations that save the results themselves."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ictx.kernels.attention import flash4, reference
from ictx.kernels.attention.op import choice, padded, tiles
from ictx.kernels.attention.packing import Packing

CUDNN, CUDNN_BACKWARD = (
    torch.ops.aten._scaled_dot_product_cudnn_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention_backward,
)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, packing: Packing) -> tuple[Tensor, Tensor]:
    """Returns the result of `mla_attention` for the same arguments, and the scores' log-sum-exp [heads, tokens].

    The log-sum-exp is float32, or float64 if the tensors are.
    """
    name = choice("mla_attention", q, v.shape[-1], packing.equal, packing.edges is not None).name
    if name == "torch":
        return reference.forward(q, k, v, scale, packing.first)
    if name == "triton":
        found = torch.ops.ictx.mla_attention(*padded(q, k, v), scale, *_documents(packing), tiles(q.device))
        return found[0][..., : v.shape[-1]], found[1]
    if name == "flash4":
        return flash4.forward(q, k, v, scale, packing.equal, packing.edges)
    rows = packing.equal
    out, lse, *_ = CUDNN(*(_rows(x, rows) for x in (q, k, v)), None, True, 0.0, True, False, scale=scale)
    return out.transpose(1, 2).flatten(0, 1), lse.reshape(rows, q.shape[1], -1).transpose(0, 1).flatten(1)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, packing: Packing
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v from the gradient of `out` and the results of `forward`."""
    name = choice("mla_attention", q, v.shape[-1], packing.equal, packing.edges is not None).name
    if name == "torch":
        return reference.backward(grad, q, k, v, out, lse, scale, packing.first)
    if name == "triton":
        wide = padded(q, k, v)
        columns = (0, wide[2].shape[-1] - v.shape[-1])
        dq, dk, dv = torch.ops.ictx.mla_attention_backward(
            F.pad(grad, columns), *wide, F.pad(out, columns).contiguous(), lse, scale, *_documents(packing),
            tiles(q.device),
        )  # fmt: skip
        return dq[..., : q.shape[-1]], dk[..., : k.shape[-1]], dv[..., : v.shape[-1]]
    if name == "flash4":
        return flash4.backward(grad, q, k, v, out, lse, scale, packing.equal, packing.edges)
    rows, length = packing.equal, q.shape[0] // packing.equal
    stats = lse.view(-1, rows, length).transpose(0, 1).contiguous()
    # The random seed is unused without dropout; the lengths are used only for packed documents.
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients = CUDNN_BACKWARD(
        *(_rows(x, rows) for x in (grad, q, k, v, out)), stats[..., None] if _stats_axes(q.device) == 4 else stats,
        seed, seed, None, None, None, length, length, 0.0, True, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (x.transpose(1, 2).flatten(0, 1) for x in gradients)
    return dq, dk, dv


def _rows(x: Tensor, rows: int) -> Tensor:
    """Returns [tokens, heads, width] as (rows, heads, tokens of a row, width)."""
    return x.view(rows, -1, *x.shape[1:]).transpose(1, 2)


def _documents(packing: Packing) -> tuple[Tensor | None, Tensor | None]:
    """Returns the kernels' arguments `first` and `end`; None for one document."""
    return (None, None) if packing.equal == 1 else (packing.first, packing.end)


@functools.cache
def _stats_axes(device: torch.device) -> int:
    """Returns the number of axes of cuDNN's log-sum-exp: 3 (rows, heads, tokens), or 4 in some versions of PyTorch."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.float16, device=device)
    return int(CUDNN(x, x, x, None, True, 0.0, True, False)[1].dim())
