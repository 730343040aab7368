"""`mla_attention`: causal attention within packed documents, with its gradient, for training."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ictx.kernels import dispatch
from ictx.kernels.attention import flash4, reference
from ictx.kernels.attention.launches import widths
from ictx.kernels.attention.operation import OPERATION
from ictx.kernels.attention.packing import Packing
from ictx.kernels.attention.tuning import AttentionConfig, attention_config

LIMIT = 1 << 31
"""Tensor size in values from which 32-bit offsets overflow; our kernels use 64-bit offsets."""
WIDEST, WIDEST_VALUE = 192, 128
"""Largest widths of a head's queries and values that the kernels' tiles support."""


def choice(operation: str, q: Tensor, value_width: int, equal: int = 0, edges: bool = False) -> dispatch.Choice:
    """Returns the implementation for these queries [..., width], and the reason.

    Args:
        equal: `Packing.equal`.
        edges: whether the packing has `Packing.edges`.
    """
    wide = q.shape[-1] > WIDEST or value_width > WIDEST_VALUE
    shape = f"heads of {q.shape[-1]} and {value_width} columns are wider than {WIDEST} and {WIDEST_VALUE}"
    known = (q.shape[-1], value_width) == flash4.WIDTHS and (equal > 0 or edges)
    return dispatch.choose(operation, q.device, q.dtype, shape=shape if wide else None, equal=bool(equal), flash4=known)


def mla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    cu_seqlens: Tensor | Packing | None = None,
    *,
    config: AttentionConfig | None = None,
) -> Tensor:
    """Attends causally within each document: softmax(q · kᵀ · scale) · v, differentiable in q, k and v.

    Results and gradients of the Triton kernels are bitwise reproducible; `dispatch` selects them, not a library, if
    `torch.use_deterministic_algorithms` is on.

    Args:
        q: queries [tokens, heads, width]; the kernels support widths up to 192, larger ones use PyTorch.
        k: keys, of the shape and dtype of q.
        v: values [tokens, heads, value width] in q's dtype; the kernels support value widths up to 128.
        scale: factor on the scores before the softmax, above 0.
        cu_seqlens: first token of each document in ascending order, and the end of the last, int32 [documents + 1];
            or a `Packing`, made once for all layers. Default: one document.
        config: replaces the tuned configuration.

    Returns:
        Attended values [tokens, heads, value width] in q's dtype, contiguous.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    if q.dim() != 3 or not q.shape[1] * q.shape[2]:
        raise ValueError(f"q is {list(q.shape)}: expected [tokens, heads, width]")
    if k.shape != q.shape or k.dtype != q.dtype:
        raise ValueError(f"k is {list(k.shape)} {k.dtype}: expected {list(q.shape)} {q.dtype}")
    if v.dim() != 3 or v.shape[:2] != q.shape[:2] or not v.shape[2] or v.dtype != q.dtype:
        raise ValueError(f"v is {list(v.shape)} {v.dtype}: expected {[*q.shape[:2], 'width']} {q.dtype}")
    if not scale > 0:
        raise ValueError(f"scale is {scale}: expected more than 0")
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or not len(cu_seqlens):
            raise ValueError(
                f"cu_seqlens is {list(cu_seqlens.shape)} {cu_seqlens.dtype}: expected [documents + 1] int32"
            )
        cu_seqlens = Packing.of(cu_seqlens, q.shape[0])
    packing = cu_seqlens
    if packing is not None and packing.first.shape != q.shape[:1]:
        raise ValueError(f"cu_seqlens is for {len(packing.first)} tokens: expected {q.shape[0]}")
    equal = packing.equal if packing else 1
    edges = packing.edges if packing else None
    name = choice("mla_attention", q, v.shape[-1], equal, edges is not None).name
    if name == "torch":
        return reference.mla_attention(q, k, v, scale, packing.bounds() if packing else [])
    short = config is None and q.numel() < LIMIT
    if name == "flash4" and short:
        return flash4.attend(q, k, v, scale, equal, None if equal else edges)
    if name == "cudnn" and short:
        return cudnn(q, k, v, scale, equal)
    numbers = config.numbers() if config else tiles(q.device)
    first, end = (packing.first, packing.end) if packing else (None, None)
    out, _ = OPERATION(*padded(q, k, v), scale, first, end, numbers)
    return cast(Tensor, out)[..., : v.shape[-1]]


def padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the tensors with zero columns appended up to widths that the kernels support; scores do not change."""
    columns = sum(widths(q.shape[-1])) - q.shape[-1]
    value = max(16, 1 << (v.shape[-1] - 1).bit_length()) - v.shape[-1]
    if columns:
        q, k = F.pad(q, (0, columns)), F.pad(k, (0, columns))
    return q, k, F.pad(v, (0, value)) if value else v


@dispatch.constant
def tiles(device: torch.device) -> list[int]:
    """Returns the tuned configuration; a constant for torch.compile, which cannot read files."""
    return attention_config(dispatch.capability(device)).numbers()


def cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, rows: int) -> Tensor:
    """Returns the result of `mla_attention` from cuDNN, for tokens of `rows` documents of equal length."""
    q, k, v = (x.view(rows, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    # Not F.scaled_dot_product_attention, which would fall back to a slower kernel without a warning.
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out: Tensor = attend(q, k, v, None, True, 0.0, True, False, scale=scale)[0]
    return out.transpose(1, 2).flatten(0, 1)
