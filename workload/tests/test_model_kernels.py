"""The model uses the kernels where they can run, with unchanged results, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from interpreter import passes_interpreted
from models import small
from torch import Tensor

from ictx.infer import attention_cached
from ictx.infer.cache import LatentCache
from ictx.kernels import dispatch
from ictx.kernels.attention import operation as kernel
from ictx.model import Transformer, attention
from ictx.parallel.recompute import recompute

TOKENS = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(1))
DOCUMENTS = torch.tensor([[0] * 13 + [1] * 27, [0] * 39 + [1]])


@contextmanager
def counted(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: int, module: ModuleType = attention
) -> Iterator[None]:
    """Asserts the number of calls of a kernel's function."""
    function, calls = getattr(module, name), []
    with monkeypatch.context() as patch:
        patch.setattr(module, name, lambda *a, **k: calls.append(name) or function(*a, **k))
        yield
    assert len(calls) == expected


def agrees(run: Callable[[Transformer], Tensor]) -> None:
    """Compares a model in float16 with the same model in float32, which uses only PyTorch."""
    exact, found = run(small(num_hidden_layers=1)), run(small(num_hidden_layers=1).half())
    assert float((found.float() - exact).norm() / exact.norm()) <= 1e-2


@pytest.fixture(autouse=True)
def interpreter(request: pytest.FixtureRequest) -> None:
    """Skips if Triton was imported as a compiler."""
    if "own" not in request.node.name and not dispatch.interpreted():
        pytest.skip("runs with TRITON_INTERPRET=1")


def gradients(model: Transformer, **given: Any) -> Tensor:
    """Returns the gradient of attention's inputs, flattened."""
    model.zero_grad()
    (model(TOKENS, **given).float().log_softmax(-1)[..., 5]).sum().backward()
    return torch.cat([layer.self_attn.kv_b_proj.weight.grad.flatten() for layer in model.model.layers])


def test_training_on_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch, "mla_attention", 2):
        agrees(lambda model: model(TOKENS, document_ids=DOCUMENTS).detach())
        agrees(lambda model: gradients(model, document_ids=DOCUMENTS))


@pytest.mark.parametrize(("mode", "runs"), [("none", 1), ("selective", 1), ("full", 2)])
def test_recompute_keeps_what_the_kernel_made(mode: str, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: Transformer) -> Tensor:
        recompute(model.model.layers[0], mode)
        return gradients(model.train(), document_ids=DOCUMENTS)

    plain = gradients(small(num_hidden_layers=1).half().train(), document_ids=DOCUMENTS)
    with counted(monkeypatch, "forward", runs, kernel):
        found = run(small(num_hidden_layers=1).half())
    assert torch.equal(found, plain)


def test_rows_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones_like(TOKENS)
    mask[1, 30:] = 0
    with counted(monkeypatch, "mla_attention", 2):
        agrees(lambda model: model(TOKENS).detach())
        agrees(lambda model: model(TOKENS, attention_mask=mask)[mask.bool()].detach())


@pytest.mark.parametrize("block_size", [16, None])
@pytest.mark.parametrize("mode", ["expanded", "absorbed"])
def test_prefill_in_chunks(block_size: int | None, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.no_grad()
    def run(model: Transformer) -> Tensor:
        dtype = model.lm_head.weight.dtype
        cache = LatentCache(model.config, 2, 64, block_size=block_size, dtype=dtype)
        return torch.cat([model(part, cache=cache, mode=mode) for part in TOKENS.split([17, 12, 11], 1)], 1)

    # Three chunks of two sequences in one layer.
    with counted(monkeypatch, "mla_prefill", 6, attention_cached):
        agrees(run)


@pytest.mark.parametrize("block_size", [16, None])
def test_decoding_and_what_it_leaves_in_the_cache(block_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.no_grad()
    def run(model: Transformer) -> Tensor:
        dtype = model.lm_head.weight.dtype
        cache = LatentCache(model.config, 2, 64, block_size=block_size, dtype=dtype)
        # One kernel skips padding; the other requires that all sequences continue.
        mask = torch.ones(2, 9)
        mask[1, 5:] = 0
        out = [model(TOKENS[:, :9], cache=cache, attention_mask=mask)[mask.bool()]]
        for part in (TOKENS[:, 9:10], TOKENS[:, 10:13]):
            out.append(model(part, cache=cache).flatten(0, 1))
        return torch.cat([x.float() for x in out])

    with (
        counted(monkeypatch, "mla_decode", 2, attention_cached),
        counted(monkeypatch, "mla_rope_cache", 3, attention_cached),
    ):
        agrees(run)


def test_interpreted_cases_pass_in_a_process_of_their_own() -> None:
    passes_interpreted(__file__, "11 passed, 1 skipped")
