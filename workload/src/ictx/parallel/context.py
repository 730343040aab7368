"""Context parallelism: the ranks of a group hold consecutive parts of the same windows.

Attention is DeepSpeed-Ulysses (arXiv:2309.14509) for latents: the latents and rotary keys of all tokens are gathered,
576 columns instead of the 16 × 320 of keys and values, and each rank expands its own heads from them. Queries and
results are exchanged by all-to-all: tokens ↔ heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ictx.kernels.attention import pair
from ictx.kernels.attention.packing import Packing
from ictx.parallel.exchange import GROUPS, Heads, gather, scatter_sum


@dataclass(frozen=True)
class Context:
    """The ranks of a group that share each window."""

    name: str
    """Key of the process group in `GROUPS`."""
    rank: int
    """Index of this rank's part of a window."""
    count: int
    """Number of ranks in the group."""

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Context:
        """Returns the context of a process group."""
        GROUPS[group.group_name] = group
        return cls(group.group_name, group.rank(), group.size())

    def gather(self, x_bs: Tensor) -> Tensor:
        """Returns the columns of all ranks, (batch, window); without a gradient."""
        return gather(x_bs, GROUPS[self.name])

    def own(self, x_bt: Tensor) -> Tensor:
        """Returns this rank's columns of a whole window."""
        return x_bt.chunk(self.count, 1)[self.rank]

    def mean(self, x: Tensor) -> Tensor:
        """Returns the mean over the ranks; without a gradient."""
        x = x.detach().clone()
        dist.all_reduce(x, group=GROUPS[self.name])
        return x / self.count

    def attend(self, q_bshd: Tensor, latent_bse: Tensor, weight: Tensor, scale: float, packing: Packing) -> Tensor:
        """Returns attention of this rank's queries, (batch, sequence, heads, value width); differentiable.

        Args:
            q_bshd: this rank's queries.
            latent_bse: latents and rotary keys of the same tokens.
            weight: projection that expands latents, [heads × (width without position + value width), latent width].
            scale: factor on the scores.
            packing: documents of the whole windows.
        """
        arguments = (q_bshd, latent_bse, weight, scale, packing.first, packing.end, packing.equal, self.name)
        return cast(Tensor, torch.ops.ictx.context_attention(*arguments)[0])


@torch.library.custom_op(
    "ictx::context_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor latent, Tensor weight, float scale, Tensor first, Tensor end, int equal, str group) -> "
    "(Tensor, Tensor)",
)
def operation(
    q: Tensor, latent: Tensor, weight: Tensor, scale: float, first: Tensor, end: Tensor, equal: int, group: str
) -> tuple[Tensor, Tensor]:
    """`Context.attend` as one operation, so that torch.compile and selective recompute can refer to it.

    Returns the attended values, and the log-sum-exp of the scores of this rank's heads, [heads, tokens of the windows].
    """
    heads, packing = Heads(q, latent, weight, group), Packing(first, end, equal)
    out, lse = _results(q, weight, heads.nope, heads.ranks)
    for part, (queries,) in heads.arriving(q):
        k, v = heads.keys_values(part)
        attended, lse[part] = pair.forward(heads.taken(queries), k, v, scale, packing)
        heads.leave(attended, part, out)
    heads.settle()
    return out, lse


@torch.library.custom_op(
    "ictx::context_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor latent, Tensor weight, Tensor out, Tensor lse, float scale, Tensor first, "
    "Tensor end, int equal, str group) -> (Tensor, Tensor, Tensor)",
)
def operation_backward(
    grad: Tensor, q: Tensor, latent: Tensor, weight: Tensor, out: Tensor, lse: Tensor, scale: float, first: Tensor,
    end: Tensor, equal: int, group: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of q, latent and weight; the weight's is nonzero only for this rank's heads.

    Latents are gathered and expanded again: keeping them would take 2 × T × 576 bytes per layer on every rank.
    """
    heads, packing = Heads(q, latent, weight, group), Packing(first, end, equal)
    d_q, d_weight = torch.empty_like(q), torch.zeros_like(weight)
    d_own = d_weight.view_as(heads.weight)[heads.rank]
    # Accumulated in float32 over parts of the heads and over ranks: bfloat16 would round each sum.
    d_latent = torch.zeros(len(heads.latent_nc), latent.shape[-1], dtype=lse.dtype, device=q.device)
    for part, arrived in heads.arriving(grad, q, out):
        k, v = heads.keys_values(part)
        d_out, q_part, out_part = map(heads.taken, arrived)
        d_q_part, d_k, d_v = pair.backward(d_out, q_part, k, v, out_part, lse[part], scale, packing)
        heads.leave(d_q_part, part, d_q)
        d_kv = torch.cat([d_k[..., : heads.nope], d_v], -1).flatten(1)
        d_own[part] = (d_kv.T @ heads.latent_nc).view_as(d_own[part])
        d_latent[:, : heads.latent_width] += d_kv @ heads.weight[heads.rank, part].flatten(0, 1)
        d_latent[:, heads.latent_width :] += d_k[..., heads.nope :].sum(1, dtype=lse.dtype)
    heads.settle()
    d_latent = d_latent.view(heads.batch, -1, latent.shape[-1])
    return d_q, scatter_sum(d_latent, heads.group).to(latent.dtype), d_weight


def _results(q: Tensor, weight: Tensor, nope: int, ranks: int) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    kind = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(batch, tokens, heads, weight.shape[0] // heads - nope)
    return out, q.new_empty(heads // ranks, batch * tokens * ranks, dtype=kind)


@operation.register_fake
def _(
    q: Tensor, latent: Tensor, weight: Tensor, scale: float, first: Tensor, end: Tensor, equal: int, group: str
) -> tuple[Tensor, Tensor]:
    nope = q.shape[-1] - (latent.shape[-1] - weight.shape[1])
    return _results(q, weight, nope, len(first) // (q.shape[0] * q.shape[1]))


@operation_backward.register_fake
def _(grad: Tensor, q: Tensor, latent: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), latent.new_empty(latent.shape), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, latent, weight, scale, first, end, equal, group = inputs
    ctx.save_for_backward(q, latent, weight, *output, first, end)
    ctx.rest = scale, equal, group
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, latent, weight, out, lse, first, end = ctx.saved_tensors
    scale, equal, group = ctx.rest
    arguments = (grad, q, latent, weight, out, lse, scale, first, end, equal, group)
    return *torch.ops.ictx.context_attention_backward(*arguments), None, None, None, None, None


operation.register_autograd(_backward, setup_context=_keep)
OPERATION = torch.ops.ictx.context_attention.default
"""The operation's name for selective recompute."""
