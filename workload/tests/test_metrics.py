"""What a run tells monitoring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ictx.metrics import flops_per_token, model_flops_utilisation, peak_flops, write_about
from ictx.model import ModelConfig

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
    size = 1_004_623_872
    embedding = 65536 * 2048
    assert flops_per_token(ICTX_1B, size, 0) == 6 * (size - embedding)
    # Scores and values of 16 layers × 16 heads of (192 + 128), 2 operations each, half the window, three passes.
    attention = 3 * 16 * 16 * (192 + 128) * 2 * 4096 / 2
    assert flops_per_token(ICTX_1B, size, 4096) - flops_per_token(ICTX_1B, size, 0) == attention


def test_utilisation_is_the_share_of_the_peak() -> None:
    assert model_flops_utilisation(1000.0, 6e9, 312e12)["mfu"] == pytest.approx(0.01923, rel=1e-3)


def test_without_a_known_peak_there_is_no_utilisation() -> None:
    assert peak_flops(torch.device("cpu")) is None
    assert model_flops_utilisation(1000.0, 6e9, None) == {}


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Odd", None)],
)
def test_the_peak_follows_the_gpus_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
