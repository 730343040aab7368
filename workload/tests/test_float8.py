"""fp8: rejected settings, and the results of layers with fp8 products, emulated on a CPU."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import MOE, SMALL
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ictx.errors import UserError
from ictx.kernels import dispatch
from ictx.model import ModelConfig, Transformer
from ictx.parallel import float8, parallelize
from ictx.train.config import load
from ictx.train.pretrain import main as train

TOKENS = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(6))
needs_torchao = pytest.mark.skipif(
    not importlib.metadata.packages_distributions().get("torchao"), reason="requirements/test.txt is not installed"
)


def test_where_it_cannot_be_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def installed(name: str) -> str:
        if name != "torchao":
            return version(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", installed)
    pinned, missing = float8.TORCHAO, f"torchao {float8.TORCHAO} is not installed"
    for cc, recipe, found, wanted in (  # noqa: B007  (what `installed` returns)
        (
            None,
            "tensorwise",
            pinned,
            "needs compute capability 8.9, there is no NVIDIA GPU here: use another GPU, or --set ",
        ),
        (80, "tensorwise", pinned, "this GPU has 8.0"),
        (89, "rowwise", pinned, "needs compute capability 9.0, this GPU has 8.9"),
        (90, "rowwise", None, f"{missing}: install requirements/cuda-fp8.txt, or --set train.fp8=none"),
        (90, "rowwise", "0.1.0", f"{missing}, but 0.1.0: install"),
    ):
        monkeypatch.setattr(dispatch, "standing_for", cc)
        with pytest.raises(UserError, match=f"^train.fp8 is {recipe}: .*{re.escape(wanted)}"):
            float8.check(recipe, torch.device("cpu"))
    found = float8.TORCHAO
    for cc, recipe in ((89, "tensorwise"), (90, "rowwise"), (100, "rowwise_with_gw_hp")):
        monkeypatch.setattr(dispatch, "standing_for", cc)
        float8.check(recipe, torch.device("cpu"))
    lock = Path(float8.__file__).parents[3] / "requirements" / "cuda-fp8.txt"
    assert f"torchao=={float8.TORCHAO} " in lock.read_text()


def test_a_run_is_refused_before_it_reads_anything(tmp_path: Path) -> None:
    wanted = ["train.fp8=rowwise", "train.compile=true", f"run.dir={tmp_path}/run", f"data.dir={tmp_path}/nothing"]
    with pytest.raises(UserError, match=r"^train.fp8 is rowwise: .*no NVIDIA GPU"):
        train(load("pretrain/ictx-1b.yaml", wanted))
    for wrong in ("train.compile=false", "train.dtype=float32", "train.fp8=int4"):
        with pytest.raises(UserError, match="fp8 is"):
            load("pretrain/ictx-1b.yaml", [*wanted, wrong])


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def trained(mesh: DeviceMesh, recipe: str | None, settings: dict[str, Any], **how: Any) -> tuple[Tensor, Tensor, Any]:
    """Returns loss, gradient and the names of weights."""
    with torch.device("meta"):
        model = Transformer(ModelConfig(**(SMALL | settings)))
    names = [*model.state_dict()]
    if recipe:
        float8.convert(model, recipe, emulated=True)
    assert [*model.state_dict()] == names
    parallelize(model, mesh, dtype=None, **how).to_empty(device="cpu")
    model.init_weights(3)
    loss = model.train()(TOKENS[:, :-1], labels=TOKENS[:, 1:])
    sum(model.auxiliary_losses().values(), loss).backward()
    gradients = [weight.grad.full_tensor().flatten() for weight in model.parameters()]  # type: ignore[union-attr]
    return loss.detach(), torch.cat(gradients), [type(module).__name__ for module in model.modules()]


@needs_torchao
@pytest.mark.parametrize("recipe", float8.RECIPES)
def test_it_is_nearly_what_it_was(recipe: str, mesh: DeviceMesh) -> None:
    """fp8 has a mantissa of three bits: each product has an error of some percent, the loss a much smaller one."""
    settings = {"moe": MOE, "num_nextn_predict_layers": 1}
    loss, gradient, kinds = trained(mesh, recipe, settings)
    wanted, exact, _ = trained(mesh, None, settings)
    assert float(loss) == pytest.approx(float(wanted), rel=5e-3)
    assert 1e-3 < float((gradient - exact).norm() / exact.norm()) < 0.2
    # In each of four layers, three projections of attention (the queries' rank of 24 is not a multiple of 16) and three
    # of the feed-forward layer or shared experts; and the projection of the further prediction. Not head and routers.
    assert kinds.count("Float8Linear") == 4 * (3 + 3) + 1
    assert kinds.count("Head") == 1


@needs_torchao
def test_recomputed_and_compiled_it_is_the_same(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = trained(mesh, "rowwise", {})
    torch.testing.assert_close(trained(mesh, "rowwise", {}, mode="selective")[:2], wanted[:2])
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compile(f, backend="aot_eager", fullgraph=True, **k))
    torch._dynamo.reset()
    found = trained(mesh, "rowwise", {}, mode="selective", compiled=True)
    torch.testing.assert_close(found[:2], wanted[:2])
