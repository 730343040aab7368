"""Sharding, recompute and compilation do not change loss and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import MOE, small
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ictx.errors import UserError
from ictx.model import ModelConfig, Transformer
from ictx.parallel import MODES, parallelize, recompute
from ictx.settings import shipped
from ictx.train.config import LoraConfig, load
from ictx.train.lora import adapt, init_adapter

TOKENS = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(6))
DOCUMENTS = torch.tensor([[0] * 9 + [1] * 23, [0] * 32])
DENSE: dict[str, Any] = {"num_hidden_layers": 3}
EXPERTS: dict[str, Any] = {"num_hidden_layers": 3, "moe": MOE, "num_nextn_predict_layers": 1}


def test_settings_of_shipped_runs() -> None:
    for path in (files := shipped("pretrain/*.yaml")):
        assert load(str(path), ["run.dir=/nowhere"]).train.recompute in MODES
    assert {"ictx-1b.yaml", "tiny.yaml"} <= {path.name for path in files}
    # The tokens of an epoch, with one window for each of four ranks.
    loop = load("pretrain/ictx-1b.yaml", []).train
    assert loop.steps * 4 * loop.batch_size * loop.sequence_length == pytest.approx(465e6, rel=1e-3)
    for wrong in ("recompute=some", "recompute_layers=-1"):
        with pytest.raises(UserError, match=f"train.{wrong.split('=')[0]} is"):
            load("pretrain/ictx-1b.yaml", [f"train.{wrong}"])


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """The mesh of a job with only this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def config_of(**changes: Any) -> ModelConfig:
    return small(**changes).config


def trained(
    model: Transformer, documents: Tensor | None = None, steps: int = 1
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Returns loss, gradients, and the tokens per expert."""
    model.init_weights(3)
    model.train()
    for _ in range(steps):
        model.zero_grad()
        loss = model(TOKENS[:, :-1], labels=TOKENS[:, 1:], document_ids=documents)
        loss = sum(model.auxiliary_losses().values(), loss)
        loss.backward()  # type: ignore[no-untyped-call]
    gradients = [weight.grad for weight in model.parameters()]
    whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in gradients]
    return loss.detach(), whole, [router.tokens_per_expert.clone() for router in model.routers]


def spread(config: ModelConfig, mesh: DeviceMesh, **how: Any) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    parallelize(model, mesh, dtype=None, **how).to_empty(device="cpu")
    return model


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one text", "documents"])
@pytest.mark.parametrize("settings", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_every_mode_gives_the_same_gradients(
    settings: dict[str, Any], documents: Tensor | None, mesh: DeviceMesh
) -> None:
    wanted = trained(Transformer(config_of(**settings)), documents)
    assert len(wanted[2]) == (3 if settings is EXPERTS else 0)
    for mode, layers in [*((mode, None) for mode in MODES), ("selective", 1)]:
        found = trained(spread(config_of(**settings), mesh, mode=mode, layers=layers), documents)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def saved_bytes(model: Transformer) -> int:
    """Returns the bytes that a forward keeps for the backward, without weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        model(TOKENS[:, :-1], labels=TOKENS[:, 1:])
    return sum(kept.values())


def test_a_mode_keeps_less_and_fewer_layers_keep_more() -> None:
    def kept(mode: str, count: int) -> int:
        model = small(**DENSE)
        for layer in model.model.layers[:count]:
            recompute.recompute(layer, mode)
        return saved_bytes(model)

    assert kept("full", 3) < kept("full", 1) < kept("none", 3)
    # Selective recompute stores its tensors itself, not through the hooks that this counts.
    assert kept("selective", 3) < kept("none", 3) / 2


def attention_calls(mode: str) -> int:
    """Returns the number of attention calls in a forward and backward of two layers."""
    model, runs = small(num_hidden_layers=2).train(), 0

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal runs
            runs += func in recompute.KEPT
            return func(*args, **kwargs or {})

    for layer in model.model.layers:
        recompute.recompute(layer, mode)
    with Counter():
        model(TOKENS[:, :-1], labels=TOKENS[:, 1:]).backward()
    return runs


def test_attention_is_not_computed_again_unless_all_is() -> None:
    assert {mode: attention_calls(mode) for mode in MODES} == {"none": 2, "selective": 2, "full": 4}


def adapter_gradients(mode: str) -> list[Tensor]:
    """Returns the gradients of an adapter with dropout 0.5."""
    model = small(num_hidden_layers=2).train()
    adapt(model, LoraConfig(rank=4, dropout=0.5))
    init_adapter(model, 3)
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.no_grad():
        for weight in learned:
            weight.add_(0.1)
    for layer in model.model.layers:
        recompute.recompute(layer, mode)
    torch.manual_seed(3)
    model(TOKENS[:, :-1], labels=TOKENS[:, 1:]).backward()
    return [weight.grad for weight in learned]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_an_adapter_drops_it_drops_again_where_it_is_computed_again(mode: str) -> None:
    torch.testing.assert_close(adapter_gradients(mode), adapter_gradients("none"))


@pytest.mark.gpu
def test_an_adapter_begins_with_the_same_numbers_on_a_gpu() -> None:
    adapters = []
    for device in ("cpu", "cuda"):
        model = small(num_hidden_layers=1).to(device)
        adapt(model, LoraConfig(rank=4))
        init_adapter(model, 3)
        adapters.append({name: weight.cpu() for name, weight in model.named_parameters() if weight.requires_grad})
    assert any(weight.any() for weight in adapters[0].values())
    torch.testing.assert_close(*adapters, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_equals_eager(mode: str, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """All dense layers are the same graph; a stub replaces the compiler's back end."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compile(f, backend="aot_eager", fullgraph=True, **k))
    torch._dynamo.reset()
    counters.clear()
    wanted = trained(Transformer(config_of(**DENSE)))
    found = trained(spread(config_of(**DENSE), mesh, mode=mode, compiled=True), steps=2)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert counters["stats"]["unique_graphs"] == 1


def test_experts_stay_as_they_are_where_layers_are_compiled(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda forward, **_: compiled.append(forward) or forward)
    spread(config_of(**EXPERTS), mesh, mode="selective", compiled=True)
    assert len(compiled) == 1, "the first layer is dense"
