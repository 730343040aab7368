"""`recompute: auto`: the memory estimate against measurements in docs/training.md, and the selected mode."""

from __future__ import annotations

import pytest
import torch
from models import SMALL

from ictx.errors import UserError
from ictx.model import ModelConfig, Transformer
from ictx.parallel import MODES, memory
from ictx.parallel.memory import Work, choose, plan, plans
from ictx.train import sharded
from ictx.train.config import LoopConfig, load
from ictx.train.dpo_config import DpoConfig
from ictx.train.ranks import Ranks


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


LARGE = on_meta(ModelConfig.named("ictx-1b"))
EXPERTS = on_meta(ModelConfig.named("ictx-1b-moe"))
LONG, SHORT = 32768, 8192
MEASURED: dict[str, tuple[Work, int, float]] = {
    "32k, 2 ranks, eager": (Work(LONG, 2), 16, 15.1),
    "32k, 2 ranks": (Work(LONG, 2, compiled=True), 16, 14.2),
    "32k, 2 ranks, 8 layers": (Work(LONG, 2, compiled=True), 8, 31.6),
    "32k, 2 ranks, 7 layers": (Work(LONG, 2, compiled=True), 7, 34.0),
    "32k, 2 ranks, none, eager": (Work(LONG, 2), 0, 56.4),
    "32k, 2 ranks, none": (Work(LONG, 2, compiled=True), 0, 50.5),
    "8k, 2 ranks, eager": (Work(SHORT, 2), 16, 9.6),
    "8k, 2 ranks, none, eager": (Work(SHORT, 2), 0, 20.2),
    "8k, 2 ranks, none": (Work(SHORT, 2, compiled=True), 0, 18.7),
    "32k, 1 rank": (Work(LONG, 1, compiled=True), 16, 20.2),
    "32k, 4 ranks": (Work(LONG, 4, compiled=True), 16, 11.2),
    "32k, 4 ranks, 8 layers": (Work(LONG, 4, compiled=True), 8, 28.6),
    "2 × 32k, 2 ranks": (Work(2 * LONG, 2, compiled=True), 16, 21.0),
    "32k, CP 2": (Work(LONG // 2, 2, cp=2, compiled=True), 16, 11.3),
    "32k, CP 2 × FSDP 2": (Work(LONG // 2, 4, cp=2, compiled=True), 16, 8.2),
    "32k, CP 4": (Work(LONG // 4, 4, cp=4, compiled=True), 16, 6.4),
    "32k, 2 ranks, accumulated": (Work(LONG, 2, compiled=True, accumulate=True), 16, 16.2),
    "32k, 2 ranks, reduced once": (Work(LONG, 2, compiled=True, accumulate=True, reduce_once=True), 16, 18.2),
    "8k, 2 ranks": (Work(SHORT, 2, compiled=True), 16, 9.4),
    "524,288, CP 2": (Work(1 << 18, 2, cp=2), 16, 52.9),
    "1,048,576, CP 4": (Work(1 << 18, 4, cp=4), 16, 53.7),
}
"""Number of layers that keep only attention's result, and GB allocated: docs/training.md, 2026-11-26 and 27, H200."""


@pytest.mark.parametrize("row", MEASURED)
def test_what_is_computed_is_what_was_measured(row: str) -> None:
    work, layers, measured = MEASURED[row]
    found = plan(LARGE, work, ("selective",) * layers + ("none",) * (16 - layers))
    assert found.need / 1e9 == pytest.approx(measured, rel=0.05)


def test_with_experts_and_the_further_prediction_too() -> None:
    assert plan(EXPERTS, Work(4096, 2), ("none",) * 17).need / 1e9 == pytest.approx(46.2, rel=0.05)


def test_more_memory_means_that_less_is_computed_again() -> None:
    assert [*plans(2)] == [
        ("none", "none"),
        ("selective", "none"),
        ("selective", "selective"),
        ("full", "selective"),
        ("full", "full"),
    ]
    work, order, last = Work(LONG, 2, compiled=True), [*plans(16)], 32
    for budget in range(1, 81):
        found = choose(LARGE, work, budget * 1e9)
        assert order.index(found.modes) <= last
        assert found.need <= budget * 1e9 or set(found.modes) == {"full"}
        last = order.index(found.modes)
        assert not last or plan(LARGE, work, order[last - 1]).need > budget * 1e9
    assert last == 0
    assert str(choose(LARGE, work, 32e9)).startswith(
        "selective in 8, none in 8 of 16 layers takes 31.5 GB (weights 2.0"
    )


class OneOf(Ranks):
    """A rank whose peers have less GPU memory."""

    def largest(self, *values: float) -> list[float]:
        return [max(value, -others) for value, others in zip(values, OTHERS, strict=True)]


OTHERS = [35e9]


def test_all_ranks_choose_for_the_one_with_the_least_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Mesh:
        ndim = 1

        def size(self, axis: int) -> int:
            return 2

    loop, mesh = LoopConfig(1, LONG, 1, recompute="auto", compile=True), Mesh()
    chosen = set()
    for own in (36e9, 40e9, 80e9):
        monkeypatch.setattr(sharded, "available", lambda device, own=own: own)
        ranks = OneOf(0, 2, torch.device("cuda"), mesh)  # type: ignore[arg-type]
        chosen.add(tuple(sharded.automatic(LARGE, loop, ranks)))
    assert chosen == {choose(LARGE, Work(LONG, 2, compiled=True), 35e9 - memory.SPARE).modes}
    said = capsys.readouterr().out
    assert "recompute auto: selective in " in said
    assert "of the 35.0 GB left, less 4 to spare" in said
    monkeypatch.setattr(sharded, "available", lambda device: 9e9)
    assert set(sharded.automatic(LARGE, loop, ranks)) == {"full"}
    assert "MORE THAN the 9.0 GB left" in capsys.readouterr().out


def test_without_a_gpu_it_is_selective(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(0, 1, torch.device("cpu"), None)  # type: ignore[arg-type]
    model = on_meta(ModelConfig(**SMALL, num_nextn_predict_layers=1))
    assert sharded.automatic(model, LoopConfig(1, 64, 1, recompute="auto"), ranks) == ["selective"] * 4
    assert "(no GPU)" in capsys.readouterr().out


def test_preference_optimization_which_is_not_counted_refuses_it() -> None:
    model = ModelConfig(**SMALL)
    assert DpoConfig(model, LoopConfig(1, 64, 1, recompute="selective"))
    for name, value in {"recompute": "auto", "z_loss": 1e-4}.items():
        with pytest.raises(ValueError, match=f"train.{name} is .*: not supported by preference optimization"):
            DpoConfig(model, LoopConfig(1, 64, 1, **{name: value}))  # type: ignore[arg-type]


def test_settings_that_contradict_it_are_refused() -> None:
    assert load("pretrain/tiny.yaml", ["train.recompute=auto"]).train.recompute == "auto" not in MODES
    for wrong in ("offload=true", "recompute_layers=3"):
        with pytest.raises(
            UserError, match=r"train\.(recompute|offload) is .*auto|recompute is 'auto'|offload is true"
        ):
            load("pretrain/tiny.yaml", ["train.recompute=auto", f"train.{wrong}"])
