"""The projection to the vocabulary, and the next-token loss, computed in chunks to limit the memory of logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ictx.kernels import dispatch

LOGITS = 1 << 28
"""Maximum logits in memory: 4,096 tokens with a vocabulary of 65,536 entries, 512 MiB in bfloat16."""


class Head(nn.Linear):
    """A linear layer without bias, with its loss."""

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def loss(self, hidden_bsd: Tensor, labels_bs: Tensor, chunk: int | None = None) -> Tensor:
        """Returns the mean cross-entropy of the labels in nats, float32; 0 if no label counts.

        Args:
            hidden_bsd: the head's input.
            labels_bs: the token to predict at each position; negative labels are ignored.
            chunk: tokens per chunk of logits; default: the number that makes `LOGITS`.
        """
        return self.losses(hidden_bsd, labels_bs, chunk)[0]

    def losses(
        self, hidden_bsd: Tensor, labels_bs: Tensor, chunk: int | None = None, z_weight: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss with the z-loss added, and the z-loss alone, detached.

        The z-loss is the mean of `z_weight` · log² Z, Z being the sum of a token's exponentiated logits; it prevents
        drift of the logits (PaLM, arXiv:2204.02311, section 5). It is 0 if gradients are disabled.
        """
        hidden_nd, labels_n = hidden_bsd.flatten(0, 1), labels_bs.flatten()
        chunk = chunk or max(LOGITS // self.out_features, 1)
        if torch.is_grad_enabled():
            found = _Loss.apply(hidden_nd, self.weight, labels_n, chunk, z_weight)  # type: ignore[no-untyped-call]
            return cast("tuple[Tensor, Tensor]", found)
        total = hidden_nd.new_zeros((), dtype=torch.float32)
        for x_nd, labels in zip(torch.split(hidden_nd, chunk), torch.split(labels_n, chunk), strict=True):
            # Through the module, so that hooks can record its magnitude.
            total += F.cross_entropy(self(x_nd).float(), labels.clamp(min=-1), ignore_index=-1, reduction="sum")
        return total / (labels_n >= 0).sum().clamp(min=1), torch.zeros_like(total)

    def log_probs(self, hidden_bsd: Tensor, labels_bs: Tensor, chunk: int | None = None) -> Tensor:
        """Returns each label's log-probability, float32 (batch, sequence); 0 for ignored labels.

        Arguments are those of `loss`. The backward pass recomputes the logits: it needs the gradient of each token.
        """
        counts_bs = labels_bs >= 0
        chunk = chunk or max(LOGITS // self.out_features, 1)
        # Skip prompts and padding, often most of the tokens.
        arguments = hidden_bsd[counts_bs], self.weight, labels_bs[counts_bs], chunk
        found = cast(Tensor, _LogProbs.apply(*arguments))  # type: ignore[no-untyped-call]
        return found.new_zeros(labels_bs.shape).masked_scatter(counts_bs, found)


def to_gradient(
    logits_nv: Tensor, targets_n1: Tensor, weights_n1: Tensor, z_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns the weighted sums of the rows' cross-entropies and z-losses; overwrites the logits with the gradient.

    Args:
        logits_nv: any dtype; overwritten.
        targets_n1: entry to predict in each row, int64.
        weights_n1: weight of each row, in the dtype of the computation: float32, or float64 for float64 logits. Rows
            of weight 0 are ignored, even with NaN.
    """
    log_p = F.log_softmax(logits_nv, -1, dtype=weights_n1.dtype)
    entries = torch.arange(logits_nv.shape[1], device=logits_nv.device)
    counts, chosen_n1, p = weights_n1 > 0, log_p.gather(1, targets_n1), log_p.exp()
    z = log_p.new_zeros(())
    if z_weight:
        log_z = logits_nv.gather(1, targets_n1).to(log_p.dtype) - chosen_n1
        z = z_weight * torch.where(counts, log_z.square() * weights_n1, 0.0).sum()
        p = p * (1 + 2 * z_weight * log_z)
    gradient = (p - (entries == targets_n1).to(log_p.dtype)) * weights_n1
    logits_nv.copy_(torch.where(counts, gradient, 0.0))
    return -torch.where(counts, chosen_n1 * weights_n1, 0.0).sum(), z


@functools.cache
def compiled_to_gradient() -> Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    """`to_gradient` as one kernel, which reads the logits twice and writes once, without float32 in memory."""
    return torch.compile(to_gradient, dynamic=False)


class _Loss(torch.autograd.Function):
    """Computes the gradients in the forward pass, chunk by chunk, so that logits are not recomputed."""

    @staticmethod
    # Autocast does not apply to products with `out`.
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.bfloat16)  # type: ignore[untyped-decorator]
    def forward(
        ctx: Any, hidden_nd: Tensor, weight_vd: Tensor, labels_n: Tensor, chunk: int, z_weight: float
    ) -> tuple[Tensor, Tensor]:
        """Returns the total loss, and the z-loss in it."""
        # Accumulate over chunks in float32: bfloat16 would round each sum.
        work = torch.promote_types(hidden_nd.dtype, torch.float32)
        counts_n1 = (labels_n >= 0)[:, None]
        weights_n1, targets_n1 = counts_n1.to(work) / counts_n1.sum().clamp(min=1), labels_n.clamp(min=0)[:, None]
        sums = torch.zeros(2, dtype=work, device=hidden_nd.device)
        grad_hidden, grad_weight = torch.empty_like(hidden_nd), torch.zeros_like(weight_vd, dtype=work)
        buffer = hidden_nd.new_empty(min(chunk, len(hidden_nd)), len(weight_vd))
        fused = buffer.is_cuda and dispatch.have_triton()
        chunks = (torch.split(x, chunk) for x in (hidden_nd, grad_hidden, targets_n1, weights_n1))
        for x_nd, grad_nd, targets, weights in zip(*chunks, strict=True):
            logits = torch.mm(x_nd, weight_vd.T, out=buffer[: len(x_nd)])
            sums += torch.stack((compiled_to_gradient() if fused else to_gradient)(logits, targets, weights, z_weight))
            torch.mm(logits, weight_vd, out=grad_nd)
            grad_weight += logits.T @ x_nd
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight_vd.dtype))
        ctx.mark_non_differentiable(z := sums[1])
        return sums.sum(), z

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of hidden states and weights."""
        grad_hidden, grad_weight = ctx.saved_tensors
        grads = (grad_hidden * grad).to(grad_hidden.dtype), (grad_weight * grad).to(grad_weight.dtype)
        return *grads, None, None, None


def log_probs_of(logits_nv: Tensor, targets_n1: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the targets' log-probabilities and the rows' log-sum-exp, both (rows, 1) in the dtype `work`."""
    lse_n1 = logits_nv.to(work).logsumexp(-1, keepdim=True)
    return logits_nv.gather(1, targets_n1).to(work) - lse_n1, lse_n1


def to_gradient_of_log_probs(logits_nv: Tensor, targets_n1: Tensor, lse_n1: Tensor, grad_n1: Tensor) -> None:
    """Overwrites the logits with their gradient, given that of the targets' log-probabilities, `grad_n1`."""
    entries = torch.arange(logits_nv.shape[1], device=logits_nv.device)
    p = (logits_nv.to(lse_n1.dtype) - lse_n1).exp()
    logits_nv.copy_(((entries == targets_n1).to(p.dtype) - p) * grad_n1)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function as one kernel; lengths are dynamic, because the last chunk may be shorter."""
    return torch.compile(function, dynamic=True)


class _LogProbs(torch.autograd.Function):
    """Log-probabilities of labels, computed in chunks in both passes."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cuda", cast_inputs=torch.bfloat16)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, hidden_nd: Tensor, weight_vd: Tensor, labels_n: Tensor, chunk: int) -> Tensor:
        """Returns the log-probabilities, (tokens,)."""
        work = torch.promote_types(hidden_nd.dtype, torch.float32)
        found, lse = (torch.empty(len(hidden_nd), 1, dtype=work, device=hidden_nd.device) for _ in range(2))
        buffer = hidden_nd.new_empty(min(chunk, len(hidden_nd)), len(weight_vd))
        compute = compiled(log_probs_of) if buffer.is_cuda and dispatch.have_triton() else log_probs_of
        for first in range(0, len(hidden_nd), chunk):
            rows = slice(first, first + chunk)
            logits = torch.mm(hidden_nd[rows], weight_vd.T, out=buffer[: len(hidden_nd[rows])])
            found[rows], lse[rows] = compute(logits, labels_n[rows, None], work)
        ctx.save_for_backward(hidden_nd, weight_vd, labels_n, lse)
        ctx.chunk = chunk
        return found[:, 0]

    @staticmethod
    @torch.amp.custom_bwd(device_type="cuda")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_n: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of hidden states and weights."""
        hidden_nd, weight_vd, labels_n, lse = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden_nd), torch.zeros_like(weight_vd, dtype=lse.dtype)
        buffer = hidden_nd.new_empty(min(ctx.chunk, len(hidden_nd)), len(weight_vd))
        fused = buffer.is_cuda and dispatch.have_triton()
        compute = compiled(to_gradient_of_log_probs) if fused else to_gradient_of_log_probs
        for first in range(0, len(hidden_nd), ctx.chunk):
            rows = slice(first, first + ctx.chunk)
            logits = torch.mm(hidden_nd[rows], weight_vd.T, out=buffer[: len(hidden_nd[rows])])
            compute(logits, labels_n[rows, None], lse[rows], grad_n[rows, None])
            torch.mm(logits, weight_vd, out=grad_hidden[rows])
            grad_weight += logits.T @ hidden_nd[rows]
        return grad_hidden, grad_weight.to(weight_vd.dtype), None, None
