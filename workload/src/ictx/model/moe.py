"""DeepSeekMoE: experts selected by sigmoid scores, balanced by bias updates (arXiv:2412.19437, 2.1.2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ictx.model.config import MoeConfig
from ictx.model.context import Context


class GatedProduct(nn.Module):
    """silu(gate) · up, as a module so that hooks can record its magnitude."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """Returns the product, of the shape and dtype of both."""
        return F.silu(gate) * up


AT_ONCE = 1 << 28
"""Maximum values of one intermediate tensor: 47,662 tokens at a width of 5,632, 512 MiB in 16 bits."""


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202); large inputs are processed in parts to limit memory."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.product = GatedProduct()
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_bsd: Tensor) -> Tensor:
        """Returns down(silu(gate(x)) · up(x)), of the shape and dtype of `x_bsd`."""
        tokens = AT_ONCE // self.gate_proj.out_features
        if x_bsd.shape[:-1].numel() <= tokens:
            return cast(Tensor, self.down_proj(self.product(self.gate_proj(x_bsd), self.up_proj(x_bsd))))
        x_nd = x_bsd.flatten(0, -2)
        projections = self.gate_proj, self.up_proj, self.down_proj
        if torch.is_grad_enabled() and not any(getattr(each, "adapted", False) for each in projections):
            weights = [each.weight for each in projections]
            return cast(Tensor, _InParts.apply(x_nd, *weights, tokens)).view_as(x_bsd)  # type: ignore[no-untyped-call]
        # Through the modules, for hooks on magnitudes and for replaced projections (LoRA).
        parts = torch.split(x_nd, tokens)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(self, part, use_reentrant=False) for part in parts]).view_as(x_bsd)
        return torch.cat([self(part[None])[0] for part in parts]).view_as(x_bsd)


class _InParts(torch.autograd.Function):
    """SwiGLU on parts of the tokens; the backward pass recomputes each part's intermediates."""

    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, gate: Tensor, up: Tensor, down: Tensor, tokens: int) -> Tensor:
        """Returns the result."""
        ctx.save_for_backward(x_nd, gate, up, down)
        ctx.tokens = tokens
        out = x_nd.new_empty(len(x_nd), len(down))
        for x, part in zip(torch.split(x_nd, tokens), torch.split(out, tokens), strict=True):
            torch.mm(F.silu(F.linear(x, gate)) * F.linear(x, up), down.T, out=part)
        return out

    @staticmethod
    def backward(ctx: Any, grad_nd: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients; those of weights are accumulated in float32, since bfloat16 would round each part."""
        x_nd, *weights = ctx.saved_tensors
        gate, up, down = weights
        d_x = torch.empty_like(x_nd)
        sums = [torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
        for x, grad, d_part in zip(*(torch.split(y, ctx.tokens) for y in (x_nd, grad_nd, d_x)), strict=True):
            g, u = F.linear(x, gate), F.linear(x, up)
            d_product, activated = grad @ down, F.silu(g)
            d_g, d_u = torch.ops.aten.silu_backward(d_product * u, g), d_product * activated
            for total, left, right in zip(sums, (d_g, d_u, grad), (x, x, activated * u), strict=True):
                total += left.T @ right
            torch.addmm(d_g @ gate, d_u, up, out=d_part)
        return d_x, *(total.to(weight.dtype) for total, weight in zip(sums, weights, strict=True)), None


@dataclass(frozen=True)
class Routing:
    """Experts selected for each token."""

    experts_nk: Tensor
    """Indices of the selected experts, int64."""
    weights_nk: Tensor
    """Their weights, float32."""
    scores_ne: Tensor
    """Sigmoid scores of all experts, float32."""


class Router(nn.Module):
    """Selects experts for each token."""

    e_score_correction_bias: Tensor
    """Added to the scores for the selection only; updated by `update_router_biases`, not by gradients."""
    tokens_per_expert: Tensor
    """Tokens routed to each expert since the last update of the bias."""
    counts = True
    """Whether tokens are counted in training; off while the backward pass recomputes a forward pass."""

    def __init__(self, config: MoeConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        counts = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("tokens_per_expert", counts, persistent=False)

    def float_buffers(self) -> None:
        """Restores the buffers to float32 after a change of the model's dtype."""
        self.e_score_correction_bias = self.e_score_correction_bias.float()
        self.tokens_per_expert = self.tokens_per_expert.float()

    def forward(self, x_nd: Tensor) -> Routing:
        """Returns the routing of n tokens, computed in float32."""
        config = self.config
        scores = F.linear(x_nd.float(), self.weight.float()).sigmoid()
        choice = scores.detach() + self.e_score_correction_bias
        if config.topk_group < config.n_group:
            groups_ngm = choice.view(len(choice), config.n_group, -1)
            worth_ng = groups_ngm.topk(2, -1).values.sum(-1)
            kept = torch.zeros_like(worth_ng, dtype=torch.bool)
            kept.scatter_(1, worth_ng.topk(config.topk_group, -1, sorted=False).indices, True)
            choice = groups_ngm.masked_fill(~kept[..., None], -torch.inf).flatten(1)
        experts = choice.topk(config.num_experts_per_tok, -1, sorted=False).indices
        weights = scores.gather(1, experts)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, weights * config.routed_scaling_factor, scores)


class Experts(nn.Module):
    """The routed experts of a layer, with stacked weights."""

    def __init__(self, config: MoeConfig, hidden_size: int) -> None:
        super().__init__()
        count, width = config.n_routed_experts, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, hidden_size, width))
        self.product, self.results = GatedProduct(), nn.Identity()

    def forward(self, x_nd: Tensor, routing: Routing) -> Tensor:
        """Returns the weighted sum of each token's experts, of the shape and dtype of `x_nd`."""
        chosen = routing.experts_nk.flatten()
        # Group tokens by expert.
        order = chosen.argsort(stable=True)
        tokens = order // routing.experts_nk.shape[1]
        ends = torch.bincount(chosen, minlength=len(self.down_proj)).cumsum(0)
        gate, up = multiply_groups(x_nd[tokens], self.gate_up_proj, ends).chunk(2, -1)
        results = self.results(multiply_groups(self.product(gate, up), self.down_proj, ends))
        weighted = results * routing.weights_nk.flatten()[order, None].to(results.dtype)
        return torch.zeros_like(x_nd).index_add_(0, tokens, weighted)


def multiply_groups(x_nd: Tensor, weights_eod: Tensor, ends_e: Tensor) -> Tensor:
    """Returns x·wᵀ of shape (n, o), with weight e for the rows from `ends_e[e - 1]` to `ends_e[e]`."""
    aligned = x_nd.shape[1] * x_nd.element_size() % 16 == 0 and weights_eod.shape[1] * x_nd.element_size() % 16 == 0
    if x_nd.device.type == "cuda" and x_nd.dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm"):
        return F.grouped_mm(x_nd, weights_eod.transpose(1, 2), offs=ends_e.to(torch.int32))
    bounds = [0, *ends_e.tolist()]
    spans = zip(bounds, bounds[1:], weights_eod.unbind(), strict=False)
    return torch.cat([F.linear(x_nd[first:end], weight) for first, end, weight in spans])


class MoeFeedForward(nn.Module):
    """Shared and routed experts instead of a dense feed-forward layer."""

    balance_loss: Tensor | None = None
    """Sequence-wise balance loss of the last forward pass in training."""
    context: Context | None = None
    """Context-parallel ranks that each hold a part of the sequences."""

    def __init__(self, config: MoeConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config, hidden_size)
        self.experts = Experts(config, hidden_size)
        self.shared_experts = FeedForward(hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x_bsd: Tensor) -> Tensor:
        """Returns the sum of the experts' outputs, of the shape and dtype of `x_bsd`."""
        x_nd = x_bsd.flatten(0, 1)
        routing = self.gate(x_nd)
        if self.training and torch.is_grad_enabled():
            count = self.config.n_routed_experts
            if self.gate.counts:
                self.gate.tokens_per_expert += torch.bincount(routing.experts_nk.flatten(), minlength=count)
            scores_bse = routing.scores_ne.unflatten(0, x_bsd.shape[:2])
            self.balance_loss = balance_loss(scores_bse, self.config, self.context)
        return cast(Tensor, self.experts(x_nd, routing).view_as(x_bsd) + self.shared_experts(x_bsd))


def balance_loss(scores_bse: Tensor, config: MoeConfig, context: Context | None = None) -> Tensor:
    """Returns DeepSeek-V3's balance loss within each sequence (equations 17 to 20), averaged over sequences.

    With a `context`, the loss is the mean of the ranks' results.
    """
    best = scores_bse.topk(config.num_experts_per_tok, -1).indices
    chosen = torch.zeros_like(scores_bse).scatter_(-1, best, 1.0)
    used = context.mean(chosen.mean(1)) if context else chosen.mean(1)
    share = used * (config.n_routed_experts / config.num_experts_per_tok)
    probability = (scores_bse / scores_bse.sum(-1, keepdim=True)).mean(1)
    return config.balance_loss_weight * (share * probability).sum(-1).mean()


@torch.no_grad()
def update_router_biases(routers: Iterable[Router], move: bool = True) -> Tensor | None:
    """Increases the bias of experts with fewer tokens than the mean since the last call, and decreases that of others.

    Call it once per optimizer step, on every rank of a distributed job: tokens are summed over ranks. Without `move`
    the counts are reset and the biases do not change. Returns the maximum over layers of (maximum load - mean load) /
    mean load: MaxVio (arXiv:2408.15664).
    """
    violations = []
    for router in routers:
        counts = router.tokens_per_expert
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        violations.append(counts.max() / counts.mean().clamp(min=1) - 1)
        if move:
            router.e_score_correction_bias += router.config.bias_update_speed * (counts.mean() - counts).sign()
        counts.zero_()
    return torch.stack(violations).max() if violations else None
