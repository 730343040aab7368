"""Metrics that a run exposes to monitoring."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ictx.metrics import Flops, flops_per_token, model_flops_utilisation, peak_flops, write_about
from ictx.model import ModelConfig, MoeConfig
from ictx.model.describe import parameters_by_part
from ictx.train.pretrain import Pretraining

ICTX_1B = ModelConfig(
    vocab_size=65536,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=16,
    num_attention_heads=16,
    q_lora_rank=768,
    max_position_embeddings=32768,
)


def test_about_json_says_what_the_run_is(tmp_path: Path) -> None:
    write_about(tmp_path, "pretrain", "ictx-tiny", 200, 5_000_000)
    about = json.loads((tmp_path / "about.json").read_text())
    assert about == {"stage": "pretrain", "model": "ictx-tiny", "steps": 200, "parameters": 5_000_000}
    assert [path.name for path in tmp_path.iterdir()] == ["about.json"]


def test_operations_of_a_token_are_six_per_weight_and_grow_with_the_window() -> None:
    weights = 1_004_623_872 - 65536 * 2048
    assert flops_per_token(ICTX_1B, 0).full == 6 * weights
    # Scores and values of 16 layers × 16 heads of (192 + 128), 2 operations each, in three passes.
    attention = 3 * 16 * 16 * (192 + 128) * 2 * 4096
    assert flops_per_token(ICTX_1B, 4096) == Flops(6 * weights, attention)
    assert flops_per_token(ICTX_1B, 4096).causal == 6 * weights + attention / 2


def test_of_the_experts_those_count_that_a_token_goes_to() -> None:
    moe = MoeConfig(n_routed_experts=64, num_experts_per_tok=6, moe_intermediate_size=704, n_shared_experts=2)
    config = replace(ICTX_1B, moe=moe)
    experts = 15 * 64 * 3 * 704 * 2048
    all_of_them = sum(parameters_by_part(config).values()) - 65536 * 2048
    found = flops_per_token(config, 0).full
    assert found == 6 * (all_of_them - experts * 58 // 64)
    further = flops_per_token(replace(config, num_nextn_predict_layers=1), 0).full - found
    layer = 6 * (all_of_them - experts * 58 // 64) / 16
    assert 0.8 * layer < further - 6 * 65536 * 2048 < 1.2 * layer, "a layer and a second head"


def test_utilisation_is_the_share_of_the_peak() -> None:
    found = model_flops_utilisation(1000.0, Flops(5e9, 2e9), 312e12)
    assert found == pytest.approx({"mfu_causal": 0.01923, "mfu": 0.02244}, rel=1e-3)


def test_without_a_known_peak_there_is_no_utilisation() -> None:
    assert peak_flops(torch.device("cpu")) is None
    assert model_flops_utilisation(1000.0, Flops(6e9, 0), None) == {}


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Odd", None)],
)
def test_the_peak_follows_the_gpus_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak


@pytest.mark.parametrize(("loss", "expected"), [(9.377, "27% above"), (3.69, "50% below"), (7.383, "0% below")])
def test_a_loss_is_reported_above_or_below_the_unigram_entropy(loss: float, expected: str) -> None:
    stage = object.__new__(Pretraining)
    stage.unigram_entropy = 7.383
    further, line = stage.conclude({"val_loss": loss})
    assert further == {"unigram_entropy": 7.383}
    assert line == f"validation loss {loss:.3f} nats per token, {expected} the corpus's unigram entropy 7.383"
