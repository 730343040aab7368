"""Experts and multi-token prediction in training: groups, balance, biases, losses, shards."""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MOE, small
from torch import Tensor, nn
from torch.nn.functional import silu

from ictx.model import Transformer
from ictx.model.config import MoeConfig
from ictx.model.moe import Experts, MoeFeedForward, Router, Routing, balance_loss, update_router_biases
from ictx.model.rope import rotations


def filled(module: nn.Module, scale: float = 0.3) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(0, scale, generator=generator)
    return module


def chosen_by_hand(scores: list[float], bias: list[float], config: MoeConfig) -> tuple[set[int], dict[int, float]]:
    """Selects experts as the paper defines, for one token."""
    size = config.n_routed_experts // config.n_group
    choice = [score + b for score, b in zip(scores, bias, strict=True)]
    groups = [range(first, first + size) for first in range(0, len(scores), size)]
    worth = [sum(sorted((choice[e] for e in group), reverse=True)[:2]) for group in groups]
    kept = sorted(range(len(groups)), key=lambda g: -worth[g])[: config.topk_group]
    allowed = [e for g in kept for e in groups[g]]
    experts = sorted(allowed, key=lambda e: -choice[e])[: config.num_experts_per_tok]
    total = sum(scores[e] for e in experts) if config.norm_topk_prob else 1.0
    return set(experts), {e: scores[e] / total * config.routed_scaling_factor for e in experts}


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_experts_are_chosen_as_the_paper_says(data: st.DataObject) -> None:
    groups, size = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 5))
    kept = data.draw(st.integers(1, groups))
    config = MoeConfig(
        n_routed_experts=groups * size,
        num_experts_per_tok=data.draw(st.integers(1, kept * size)),
        moe_intermediate_size=4,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=data.draw(st.booleans()),
        routed_scaling_factor=2.5,
    )
    router = filled(Router(config, 16), 0.5)
    assert isinstance(router, Router)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    router.e_score_correction_bias.normal_(0, 0.3)
    x = torch.randn(7, 16)
    with torch.no_grad():
        routing = router(x)
    for token, scores in enumerate((x @ router.weight.T).sigmoid().tolist()):
        experts, weights = chosen_by_hand(scores, router.e_score_correction_bias.tolist(), config)
        assert set(routing.experts_nk[token].tolist()) == experts
        for expert, weight in zip(routing.experts_nk[token].tolist(), routing.weights_nk[token].tolist(), strict=True):
            assert weight == pytest.approx(weights[expert], rel=1e-5)


def test_experts_of_half_precision_are_chosen_in_float32() -> None:
    router = filled(Router(MOE, 16), 0.5).bfloat16()
    assert isinstance(router, Router)
    router.float_buffers()
    x = torch.randn(50, 16, dtype=torch.bfloat16)
    exact = (x.double() @ router.weight.double().T).sigmoid()
    assert router(x).scores_ne.dtype == torch.float32
    torch.testing.assert_close(router(x).scores_ne.double(), exact, rtol=1e-6, atol=1e-6)


def test_experts_compute_what_a_loop_over_tokens_does() -> None:
    experts = filled(Experts(MOE, 24))
    assert isinstance(experts, Experts)
    x = torch.randn(11, 24)
    # Experts 0 and 7 get no tokens.
    routing = Routing(torch.randint(1, 7, (11, 3)), torch.rand(11, 3), torch.rand(11, 8))
    with torch.no_grad():
        expected = torch.zeros_like(x)
        for token in range(11):
            for expert, weight in zip(routing.experts_nk[token], routing.weights_nk[token], strict=True):
                gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
                expected[token] += weight * (experts.down_proj[expert] @ (silu(gate) * up))
        torch.testing.assert_close(experts(x, routing), expected, rtol=1e-5, atol=1e-5)


def test_biases_bring_balance() -> None:
    config = dataclasses.replace(MOE, n_group=1, topk_group=1, bias_update_speed=0.02, balance_loss_weight=0.0)
    layer = filled(MoeFeedForward(config, 16))
    assert isinstance(layer, MoeFeedForward)
    x = torch.randn(4, 64, 16) + 1.0

    def unevenness() -> float:
        layer(x)
        counts = layer.gate.tokens_per_expert
        result = (counts.max() / counts.mean()).item()
        update_router_biases([layer.gate])
        assert not layer.gate.tokens_per_expert.any()
        return result

    first = unevenness()
    for _ in range(60):
        last = unevenness()
    assert first > 1.5 > 1.25 > last
    layer.eval()
    layer(x)
    assert not layer.gate.tokens_per_expert.any(), "inference is not counted"


def test_the_balance_loss_is_least_where_experts_share_evenly() -> None:
    config = dataclasses.replace(MOE, balance_loss_weight=1.0)
    even = torch.full((1, 8, 8), 0.1)
    for token in range(8):
        even[0, token, [(token + k) % 8 for k in range(3)]] = 0.9
    uneven = torch.full((1, 8, 8), 0.1)
    uneven[:, :, :3] = 0.9
    assert balance_loss(even, config).item() == pytest.approx(1.0, rel=1e-5)
    assert balance_loss(uneven, config).item() == pytest.approx(8 / 3 * 2.7 / 3.2, rel=1e-5)
    two = balance_loss(torch.cat([even, uneven]), config).item()
    assert two == pytest.approx((1.0 + 8 / 3 * 2.7 / 3.2) / 2, rel=1e-5), "the loss is per sequence"


def further_logits(model: Transformer, tokens: Tensor) -> Tensor:
    """Returns the logits of the further prediction in training, (batch, sequence - 1, vocab_size)."""
    found: list[Tensor] = []
    handle = model.mtp[0].register_forward_hook(lambda module, inputs, output: found.append(output))
    model(tokens, labels=tokens)
    handle.remove()
    # The last position's label is an input, so it has no further label.
    return cast(Tensor, model.lm_head(found[0][:, :-1]))


def test_the_further_prediction_learns_and_shares_embedding_and_head() -> None:
    model = small(moe=MOE, num_nextn_predict_layers=1, num_hidden_layers=2).train()
    tokens = torch.arange(64).repeat(2, 1) % 13
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        main = model(tokens[:, :-1], labels=tokens[:, 1:])
        further = model.auxiliary_losses()["mtp_loss"]
        if step == 0:
            first = further.item()
            assert first > 0.3 * 0.8 * math.log(97)
        sum(model.auxiliary_losses().values(), main).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
    assert further.item() < first / 3
    further_tokens = tokens[0, 2:]
    assert (further_logits(model, tokens[:, :-1])[0].argmax(-1) == further_tokens)[20:].float().mean() > 0.9
    # Its gradient includes the shared weights.
    model(tokens[:, :-1], labels=tokens[:, 1:])
    model.auxiliary_losses()["mtp_loss"].backward()
    for shared in (model.model.embed_tokens.weight, model.lm_head.weight):
        assert shared.grad is not None
        assert shared.grad.abs().sum() > 0


def test_a_further_prediction_is_made_as_the_paper_says() -> None:
    """Equations 21 to 23: a token's state and the next token's embedding predict the token after that."""
    model = small(num_nextn_predict_layers=1)
    module, states = model.mtp[0], model.model
    with torch.no_grad():
        # Norms with different gains, to detect swapped norms.
        for number, norm in enumerate((module.enorm, module.hnorm, module.norm, states.norm)):
            norm.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(number))
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(2))
    found = further_logits(model.train(), tokens)
    head, model.lm_head = model.lm_head, nn.Identity()
    with torch.no_grad():
        hidden = model.eval()(tokens)
        rope = rotations(model.config, torch.arange(11)[None])
        read = torch.cat([module.enorm(states.embed_tokens(tokens[:, 1:])), module.hnorm(hidden[:, :-1])], -1)
        expected = head(module.norm(module.layer(module.eh_proj(read), rope)))
    torch.testing.assert_close(found, expected)


def test_a_further_prediction_sees_no_later_token() -> None:
    model = small(num_nextn_predict_layers=1).train()
    tokens = torch.randint(97, (1, 30), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 20:] = 96 - changed[0, 20:]
    one, other = further_logits(model, tokens), further_logits(model, changed)
    # Position i depends on tokens up to i + 1.
    torch.testing.assert_close(one[:, :19], other[:, :19])
    assert not torch.allclose(one[:, 19], other[:, 19])


def test_labels_below_zero_do_not_count() -> None:
    model = small(num_nextn_predict_layers=1).train()
    tokens = torch.arange(20)[None]
    assert model(tokens, labels=torch.full((1, 20), -100)).item() == 0
    assert model.auxiliary_losses()["mtp_loss"].item() == 0
    dense = small().train()
    dense(tokens, labels=tokens)
    assert dense.auxiliary_losses() == {}
