"""Context parallelism: the ranks of a group hold consecutive parts of the same windows.

Attention is DeepSpeed-Ulysses (arXiv:2309.14509) for latents: what is gathered of all tokens is the latent and the
rotary key, 576 columns instead of the 16 × 320 of keys and values, and each rank expands its own heads from them.
Queries and results change hands by all-to-all: tokens ↔ heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ictx.kernels.attention import pair
from ictx.kernels.attention.packing import Packing
from ictx.parallel.communication import COLLECTIVES

AT_ONCE = 1 << 20
"""Tokens × heads whose keys and values exist at once: all heads up to 65,536 tokens, one at a million (3 GB)."""
# Names of PyTorch 2.13, which warns of the older ones.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

GROUPS: dict[str, dist.ProcessGroup] = {}
"""By name: operations of torch.library take no groups."""


@dataclass(frozen=True)
class Context:
    """The ranks among which windows are shared out."""

    name: str
    """The process group's in `GROUPS`."""
    rank: int
    """Place of this rank's tokens."""
    count: int
    """Ranks of the group."""

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Context:
        """Returns a process group's."""
        GROUPS[group.group_name] = group
        return cls(group.group_name, group.rank(), group.size())

    def gather(self, x_bs: Tensor) -> Tensor:
        """Returns the columns of all ranks, (batch, window); without a gradient."""
        return _gather(x_bs, GROUPS[self.name])

    def own(self, x_bt: Tensor) -> Tensor:
        """Returns this rank's columns of those of a window."""
        return x_bt.chunk(self.count, 1)[self.rank]

    def mean(self, x: Tensor) -> Tensor:
        """Returns the mean over the ranks; without a gradient."""
        x = x.detach().clone()
        dist.all_reduce(x, group=GROUPS[self.name])
        return x / self.count

    def attend(self, q_bshd: Tensor, latent_bse: Tensor, weight: Tensor, scale: float, packing: Packing) -> Tensor:
        """Returns what this rank's queries attend to, (batch, sequence, heads, value width); differentiable.

        Args:
            q_bshd: this rank's queries.
            latent_bse: latents and rotary keys of the same tokens.
            weight: that expands latents, [heads × (width without position + value width), latent width].
            scale: factor on the scores.
            packing: documents of the whole windows.
        """
        arguments = (q_bshd, latent_bse, weight, scale, packing.first, packing.end, packing.equal, self.name)
        return cast(Tensor, torch.ops.ictx.context_attention(*arguments)[0])


def _gather(x_bs: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the parts of all ranks side by side along the second axis."""
    parts = x_bs.new_empty(group.size(), *x_bs.shape)
    with COLLECTIVES.timed():
        _all_gather(parts.flatten(0, 1), x_bs.contiguous(), group)
    return parts.transpose(0, 1).flatten(1, 2)


def _scatter_sum(x_bt: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns this rank's part along the second axis of the sum over ranks."""
    parts = x_bt.view(len(x_bt), group.size(), -1, x_bt.shape[-1]).transpose(0, 1).contiguous()
    total = torch.empty_like(parts[0])
    with COLLECTIVES.timed():
        _reduce_scatter(total, parts.flatten(0, 1), group=group)
    return total


def _exchanged(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns what every rank has for this one: part r goes to rank r."""
    parts = parts.contiguous()
    result = torch.empty_like(parts)
    with COLLECTIVES.timed():
        dist.all_to_all_single(result, parts, group=group)
    return result


class _Heads:
    """What a call attends with: latents of all tokens, this rank's heads in parts, exchanges with the other ranks."""

    def __init__(self, q_bshd: Tensor, latent_bse: Tensor, weight: Tensor, group: str) -> None:
        self.group = GROUPS[group]
        self.ranks, self.rank = self.group.size(), self.group.rank()
        self.batch, self.tokens, heads, width = q_bshd.shape
        self.latent_width = weight.shape[1]
        self.nope = width - (latent_bse.shape[-1] - self.latent_width)
        self.heads = heads // self.ranks
        # (rank, head of the rank, columns, latent)
        self.weight = weight.view(self.ranks, self.heads, -1, self.latent_width)
        self.value = self.weight.shape[2] - self.nope
        whole = _gather(latent_bse, self.group).flatten(0, 1)
        self.latent_nc, self.k_rope_nr = whole[:, : self.latent_width], whole[:, self.latent_width :]

    def parts(self) -> Iterator[slice]:
        """Yields the rank's heads, as many at a time as `AT_ONCE` allows."""
        step = max(AT_ONCE // len(self.latent_nc), 1)
        yield from (slice(first, min(first + step, self.heads)) for first in range(0, self.heads, step))

    def to_heads(self, x_bshd: Tensor, part: slice) -> Tensor:
        """Returns all tokens, [tokens, heads of the part, width], of a tensor that has all heads."""
        x_bsrhd = self._by_rank(x_bshd)[:, :, :, part]
        return _exchanged(x_bsrhd.permute(2, 0, 1, 3, 4), self.group).transpose(0, 1).flatten(0, 2)

    def to_tokens(self, x_nhd: Tensor, part: slice, out_bshd: Tensor) -> None:
        """Puts all tokens of some heads into a tensor that has this rank's tokens and all heads."""
        x_brshd = x_nhd.view(self.batch, self.ranks, self.tokens, *x_nhd.shape[1:])
        found = _exchanged(x_brshd.transpose(0, 1), self.group)
        self._by_rank(out_bshd)[:, :, :, part] = found.permute(1, 2, 0, 3, 4)

    def _by_rank(self, x_bshd: Tensor) -> Tensor:
        """Returns a view of shape (batch, sequence, rank, head of the rank, width)."""
        return x_bshd.view(self.batch, self.tokens, self.ranks, self.heads, -1)

    def keys_values(self, part: slice) -> tuple[Tensor, Tensor]:
        """Returns keys and values of all tokens, [tokens, heads of the part, …]."""
        tokens, count = len(self.latent_nc), part.stop - part.start
        kv = (self.latent_nc @ self.weight[self.rank, part].flatten(0, 1).T).view(tokens, count, -1)
        k_nope, v = torch.split(kv, [self.nope, self.value], -1)
        return torch.cat([k_nope, self.k_rope_nr[:, None].expand(-1, count, -1)], -1), v


@torch.library.custom_op(
    "ictx::context_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor latent, Tensor weight, float scale, Tensor first, Tensor end, int equal, str group) -> "
    "(Tensor, Tensor)",
)
def operation(
    q: Tensor, latent: Tensor, weight: Tensor, scale: float, first: Tensor, end: Tensor, equal: int, group: str
) -> tuple[Tensor, Tensor]:
    """`Context.attend` as one operation, which torch.compile and selective recompute see.

    Returns the attended values, and the log-sum-exp of the scores of this rank's heads, [heads, tokens of the windows].
    """
    heads, packing = _Heads(q, latent, weight, group), Packing(first, end, equal)
    out, lse = _results(q, weight, heads.nope, heads.ranks)
    for part in heads.parts():
        k, v = heads.keys_values(part)
        attended, lse[part] = pair.forward(heads.to_heads(q, part), k, v, scale, packing)
        heads.to_tokens(attended, part, out)
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
    """Returns the gradients of q, latent and weight; that of the weight is this rank's heads' alone, 0 elsewhere.

    Latents are gathered and expanded again: kept would be 2 × T × 576 bytes a layer, on every rank.
    """
    heads, packing = _Heads(q, latent, weight, group), Packing(first, end, equal)
    d_q, d_weight = torch.empty_like(q), torch.zeros_like(weight)
    d_own = d_weight.view_as(heads.weight)[heads.rank]
    # Summed over heads, part by part, and over ranks: bfloat16 would round each sum.
    d_latent = torch.zeros(len(heads.latent_nc), latent.shape[-1], dtype=lse.dtype, device=q.device)
    for part in heads.parts():
        k, v = heads.keys_values(part)
        d_out, q_part, out_part = (heads.to_heads(x, part) for x in (grad, q, out))
        d_q_part, d_k, d_v = pair.backward(d_out, q_part, k, v, out_part, lse[part], scale, packing)
        heads.to_tokens(d_q_part, part, d_q)
        d_kv = torch.cat([d_k[..., : heads.nope], d_v], -1).flatten(1)
        d_own[part] = (d_kv.T @ heads.latent_nc).view_as(d_own[part])
        d_latent[:, : heads.latent_width] += d_kv @ heads.weight[heads.rank, part].flatten(0, 1)
        d_latent[:, heads.latent_width :] += d_k[..., heads.nope :].sum(1, dtype=lse.dtype)
    d_latent = d_latent.view(heads.batch, -1, latent.shape[-1])
    return d_q, _scatter_sum(d_latent, heads.group).to(latent.dtype), d_weight


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
"""What selective recompute knows it by."""
