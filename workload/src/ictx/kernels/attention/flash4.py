"""FlashAttention 4 (the package `flash-attn-4`, written in the CuTe DSL) as one operation, for `mla_attention`.

Each process compiles its kernels at the first call, which takes a few seconds.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

WIDTHS = (192, 128)
"""Columns of a head's queries and values: DeepSeek's, which the package supports on all of its architectures."""


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, rows: int, edges: Tensor | None) -> Tensor:
    """Returns causal attention within each document, [tokens, heads, value width], differentiable.

    Args:
        rows: number of documents if all have the same length, else 0.
        edges: first token of each document and the end of the last, int32 [documents + 1]; required if `rows` is 0.
    """
    return forward(q, k, v, scale, rows, edges)[0]


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, rows: int, edges: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the result of `attend`, and the scores' log-sum-exp, float32 [heads, tokens]."""
    if not rows:
        return cast("tuple[Tensor, Tensor]", torch.ops.ictx.flash_attention_4(q, k, v, scale, edges))
    out, lse = torch.ops.ictx.flash_attention_4(*(_rows(x, rows) for x in (q, k, v)), scale, None)
    return out.flatten(0, 1), lse.transpose(0, 1).flatten(1)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, rows: int,
    edges: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of q, k and v from the gradient of `out` and the results of `forward`."""
    if not rows:
        found = torch.ops.ictx.flash_attention_4_backward(grad, q, k, v, out, lse, scale, edges)
        return cast("tuple[Tensor, Tensor, Tensor]", found)
    given = [_rows(x, rows) for x in (grad, q, k, v, out)]
    stats = lse.view(len(lse), rows, -1).transpose(0, 1).contiguous()
    dq, dk, dv = torch.ops.ictx.flash_attention_4_backward(*given, stats, scale, None)
    return dq.flatten(0, 1), dk.flatten(0, 1), dv.flatten(0, 1)


def _rows(x: Tensor, rows: int) -> Tensor:
    """Returns [tokens, heads, width] as [rows, tokens of a row, heads, width]."""
    return x.reshape(rows, -1, *x.shape[1:])


@torch.library.custom_op(
    "ictx::flash_attention_4",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale, Tensor? edges) -> (Tensor, Tensor)",
)
def operation(q: Tensor, k: Tensor, v: Tensor, scale: float, edges: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the attended values, and the scores' log-sum-exp in the library's layout.

    Args:
        q: [rows, length, heads, width], or [tokens, heads, width] with `edges`; likewise k and v.
    """
    from flash_attn.cute.interface import _flash_attn_fwd

    out, lse, *_ = _flash_attn_fwd(
        q, k, v, cu_seqlens_q=edges, cu_seqlens_k=edges, softmax_scale=scale, causal=True, return_lse=True
    )
    return out, lse


@operation.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, edges: Tensor | None) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse


@torch.library.custom_op(
    "ictx::flash_attention_4_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, Tensor? edges) "
    "-> (Tensor, Tensor, Tensor)",
)
def operation_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, edges: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v."""
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv = _flash_attn_bwd(
        q, k, v, out, grad, lse, softmax_scale=scale, causal=True, cu_seqlens_q=edges, cu_seqlens_k=edges
    )
    return dq, dk, dv


@operation_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, scale, edges = inputs
    ctx.save_for_backward(q, k, v, *output, edges)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, edges = ctx.saved_tensors
    found = torch.ops.ictx.flash_attention_4_backward(grad, q, k, v, out, lse, ctx.scale, edges)
    return *found, None, None


operation.register_autograd(_backward, setup_context=_keep)
OPERATION = torch.ops.ictx.flash_attention_4.default
"""The operation's name for selective recompute."""
