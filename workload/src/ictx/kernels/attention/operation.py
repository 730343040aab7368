"""The Triton kernels of `mla_attention` as torch.library operations, with fake implementations and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ictx.kernels import dispatch
from ictx.kernels.attention.launches import forward, gradients, readable, widths
from ictx.kernels.attention.tuning import AttentionConfig


@torch.library.custom_op(
    "ictx::mla_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale, Tensor? first, Tensor? end, int[] tiles) -> (Tensor, Tensor)",
)
def operation(
    q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor | None, end: Tensor | None, tiles: list[int]
) -> tuple[Tensor, Tensor]:
    """Returns the attended values, and the scores' log-sum-exp, float32 [heads, tokens].

    One operation, so that torch.compile and selective recompute can refer to it.
    """
    q, k, v = readable(q), readable(k), readable(v)
    out, lse = _results(q, v)
    if len(q):
        d0, d1 = widths(q.shape[-1])
        parts = (k[..., :d0], k[..., d0:] if d1 else k)
        forward(q, parts, v, scale, first, AttentionConfig.of_numbers(tiles).forward, out, lse)
    return out, lse


@torch.library.custom_op(
    "ictx::mla_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, Tensor? first, "
    "Tensor? end, int[] tiles) -> (Tensor, Tensor, Tensor)",
)
def operation_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, first: Tensor | None,
    end: Tensor | None, tiles: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of q, k and v."""
    q, k, v, grad = readable(q), readable(k), readable(v), readable(grad)
    return gradients(grad, q, k, v, out, lse, scale, first, end, AttentionConfig.of_numbers(tiles))


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)


@operation.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor | None, end: Tensor | None, tiles: list[int]) -> Any:
    if dispatch.standing_for is not None:
        # The tensors have no memory, but ahead-of-time compilation records the launches.
        return operation._init_fn(q, k, v, scale, first, end, tiles)
    return _results(q, v)


@operation_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    if dispatch.standing_for is not None:
        return operation_backward._init_fn(grad, q, k, v, *rest)
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, scale, first, end, tiles = inputs
    ctx.save_for_backward(q, k, v, *output, first, end)
    ctx.rest = scale, tiles
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, first, end = ctx.saved_tensors
    scale, tiles = ctx.rest
    found = torch.ops.ictx.mla_attention_backward(grad, q, k, v, out, lse, scale, first, end, tiles)
    return *found, None, None, None, None


operation.register_autograd(_backward, setup_context=_keep)
OPERATION = torch.ops.ictx.mla_attention.default
"""The operation's name for selective recompute."""
