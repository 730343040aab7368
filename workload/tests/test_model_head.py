"""The loss in chunks equals the loss of all logits, with gradients, for any chunk size and masked labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import MOE, small
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from ictx.model import Transformer
from ictx.model.float16 import tracked_amax
from ictx.model.head import Head, to_gradient

TOKENS = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(4))
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 15, [0] * 24])


def head(dtype: torch.dtype, vocabulary: int = 37) -> Head:
    made = Head(16, vocabulary).to(dtype)
    torch.nn.init.normal_(made.weight, 0, 0.5, generator=torch.Generator().manual_seed(1))
    return made


def whole(head: Head, hidden: Tensor, labels: Tensor, z_weight: float = 0.0) -> Tensor:
    """Returns the loss of all logits, computed by PyTorch in at least float32."""
    logits = head(hidden).flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.flatten().clamp(min=-1)
    loss = cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    loss = loss + z_weight * logits.logsumexp(-1)[labels >= 0].square().sum()
    return loss / (labels >= 0).sum().clamp(min=1)


@given(
    rows=st.integers(1, 3),
    length=st.integers(1, 20),
    chunk=st.integers(1, 70),
    ignored=st.floats(0, 1),
    scale=st.floats(0.01, 30),
    seed=st.integers(0, 1000),
    z_weight=st.sampled_from([0.0, 1e-4, 0.3]),
)
def test_loss_and_gradients_are_those_of_all_logits(
    rows: int, length: int, chunk: int, ignored: float, scale: float, seed: int, z_weight: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    part = head(torch.float64)
    hidden = (torch.randn(rows, length, 16, dtype=torch.float64, generator=generator) * scale).requires_grad_()
    labels = torch.randint(37, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < ignored] = -100
    wanted, alone = (whole(part, hidden, labels, weight) for weight in (z_weight, 0.0))
    found, z = part.losses(hidden, labels, chunk, z_weight)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found - z, alone, rtol=1e-12, atol=1e-12)
    assert not z.requires_grad
    with torch.no_grad():
        loss, none = part.losses(hidden, labels, chunk, z_weight)
    torch.testing.assert_close(loss.double(), alone, rtol=1e-5, atol=1e-6)
    assert none == 0, "only the cross-entropy is compared"
    inputs = (hidden, part.weight)
    for ours, theirs in zip(
        torch.autograd.grad(2.5 * found, inputs), torch.autograd.grad(2.5 * wanted, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("z_weight", [0.0, 1e-2])
def test_compiled_as_on_gpus_it_is_the_same(z_weight: float) -> None:
    logits = 5 * torch.randn(9, 37, generator=torch.Generator().manual_seed(5))
    targets, weights = torch.arange(9)[:, None], torch.tensor([[0.0], [2.0]] * 4 + [[1.0]])
    ours, theirs = logits.clone(), logits.clone()
    compiled = torch.compile(to_gradient, dynamic=False, backend="aot_eager")
    wanted, found = to_gradient(ours, targets, weights, z_weight), compiled(theirs, targets, weights, z_weight)
    torch.testing.assert_close([*found, theirs], [*wanted, ours])


def test_in_bfloat16_sums_over_chunks_are_not_rounded() -> None:
    """Gradients differ from float64's no more than those of all logits at once."""
    hidden = torch.randn(4, 512, 16, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(37, (4, 512), generator=torch.Generator().manual_seed(3))
    exact, rounded = head(torch.float64), head(torch.bfloat16)
    exact.weight.data.copy_(rounded.weight.data)

    def gradients(part: Head, loss: Any) -> list[Tensor]:
        given = hidden.bfloat16().to(part.weight.dtype).requires_grad_()
        result = loss(part, given, labels)
        assert result.dtype != torch.bfloat16
        return [x.double() for x in (result.detach(), *torch.autograd.grad(result, (given, part.weight)))]

    wanted = gradients(exact, whole)
    theirs, ours = gradients(rounded, whole), gradients(rounded, lambda p, h, y: p.loss(h, y, chunk=32))
    for a, b, c in zip(wanted, theirs, ours, strict=True):
        assert (c - a).norm() <= 1.2 * (b - a).norm() + 1e-6 * a.norm()
    assert float((ours[0] - wanted[0]).abs() / wanted[0]) < 2e-3


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one text", "documents"])
def test_a_models_loss_is_that_of_its_logits(documents: Tensor | None) -> None:
    """With masked documents, experts, and the further prediction."""
    model = small(moe=MOE, num_nextn_predict_layers=1, num_hidden_layers=2).train()
    labels = TOKENS.roll(-1, 1)
    labels[:, -1], labels[0, 3] = -100, -1
    further: list[Tensor] = []
    handle = model.mtp[0].register_forward_hook(lambda module, inputs, output: further.append(output))
    loss = model(TOKENS, labels=labels, document_ids=documents)
    handle.remove()
    added = model.auxiliary_losses()
    both = sum(added.values(), loss)
    ours = torch.autograd.grad(both, list(model.parameters()), retain_graph=True)
    wanted = whole_of_model(model, labels, documents) + added["balance_loss"]
    wanted = wanted + model.config.mtp_loss_weight * whole(model.lm_head, further[0][:, :-1], labels[:, 1:])
    torch.testing.assert_close(both, wanted)
    for a, b in zip(ours, torch.autograd.grad(wanted, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def whole_of_model(model: Transformer, labels: Tensor, documents: Tensor | None) -> Tensor:
    logits = model(TOKENS, document_ids=documents).flatten(0, 1)
    return cross_entropy(logits, labels.flatten().masked_fill(labels.flatten() < 0, -100))


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that an operation creates."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and records the size of its result."""
        result = func(*args, **kwargs or {})
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, Tensor):
                self.values = max(self.values, made.numel())
        return result


@pytest.mark.parametrize("gradients", [True, False])
def test_logits_of_all_tokens_never_exist(gradients: bool) -> None:
    part, labels = head(torch.float32, 512), torch.randint(512, (2, 128))
    with torch.set_grad_enabled(gradients), Largest() as seen:
        loss = part.loss(torch.randn(2, 128, 16, requires_grad=True), labels, chunk=16)
        if gradients:
            loss.backward()
    assert seen.values == 16 * 512


def test_validation_sees_how_large_logits_get() -> None:
    model = small()
    with torch.no_grad(), tracked_amax(model) as amax:
        model(TOKENS, labels=TOKENS)
    assert amax["lm_head output"] == pytest.approx(float(model(TOKENS).abs().max()), rel=1e-5)


@given(length=st.integers(1, 20), chunk=st.integers(1, 50), ignored=st.floats(0, 1), seed=st.integers(0, 1000))
def test_log_probabilities_are_those_of_all_logits(length: int, chunk: int, ignored: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    part = head(torch.float64)
    hidden = torch.randn(2, length, 16, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(37, (2, length), generator=generator)
    labels[torch.rand(2, length, generator=generator) < ignored] = -100
    counts, weights = labels >= 0, torch.randn(2, length, dtype=torch.float64, generator=generator)
    wanted = part(hidden).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0].where(counts, 0.0)
    found = part.log_probs(hidden, labels, chunk)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    inputs = (hidden, part.weight)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), inputs) for x in (found, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_models_log_probabilities_are_those_of_its_logits() -> None:
    model, labels = small(), TOKENS.roll(-1, 1)
    labels[:, :5] = -1
    found = model(TOKENS, labels=labels, each=True)
    wanted = model(TOKENS).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0].where(labels >= 0, 0.0)
    torch.testing.assert_close(found, wanted)
    assert float(-found.sum() / (labels >= 0).sum()) == pytest.approx(float(model(TOKENS, labels=labels)), rel=1e-5)
