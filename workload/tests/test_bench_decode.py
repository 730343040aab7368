"""`ictx bench decode`: its estimates, rejected settings, and on a GPU a complete run."""

from __future__ import annotations

import csv
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from models import small

from ictx.bench.decode import Case, Measured
from ictx.bench.floor import floor_of
from ictx.bench.report import lines, projected_least, save, values
from ictx.bench.trace import Trace, union
from ictx.cli import main
from ictx.infer.cache import LatentCache
from ictx.model import ModelConfig
from ictx.settings import config_path

SHIPPED = ModelConfig.from_yaml(config_path("model/ictx-1b-128k.yaml"))


def ictx(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ictx", *map(str, arguments)])
    return main()


def test_the_floor_counts_what_a_token_reads() -> None:
    model = small()
    read = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)
    floor = floor_of(model.config, 40, torch.bfloat16, None)
    assert floor.weights == 2 * (read + model.config.hidden_size)
    for stored in (None, "int8"):
        cache = LatentCache(model.config, 1, 48, block_size=16, dtype=torch.bfloat16, stored=stored)
        # 40 rows are read, and the new token's row is written.
        assert floor_of(model.config, 40, torch.bfloat16, stored).cache == cache.bytes_allocated * 41 // 48


def test_the_floor_of_the_shipped_model() -> None:
    floor = floor_of(SHIPPED, 131072, torch.bfloat16, None)
    assert floor.cache == 131073 * 576 * 2 * 16
    # 1,004,623,872 parameters; of the embedding's 65,536 × 2,048 only one row is read.
    assert floor.weights == 2 * (1_004_623_872 - 65_535 * 2_048)
    assert floor.seconds(3e12) == pytest.approx(1.386e-3, rel=1e-3)
    assert floor_of(SHIPPED, 131072, torch.bfloat16, "int8").cache == 131073 * 656 * 16


def test_time_at_work_counts_what_overlaps_once() -> None:
    assert union([]) == 0
    assert union([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.75)]) == pytest.approx(4.0)
    spans = [
        ("ncclDevKernel_AllGather", 0.0, 3.0),
        ("gemm", 1.0, 2.0),
        ("gemm", 5.0, 6.0),
        ("ncclDevKernel_x", 5.5, 7.0),
    ]
    assert Trace(0.0, [], spans).covered("nccl") == pytest.approx((4.5, 3.0))


def test_the_row_that_is_told_and_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    case = Case(SHIPPED, 131072, 128, None, 8e9, 8192, True)
    found = Measured(3e12, 7.5, 1.5e-3, 1.6e-3, Trace(1.52e-3, [("decode", 16, 1e-3)]), 5 * 10**9, 6 * 10**9)
    row = values("ictx-1b-128k", case, found)
    assert row["ratio"] == pytest.approx(1.5 / 1.386, rel=1e-3) and row["overhead"] == pytest.approx(0.05)
    assert row["projected_2070s_ms"] == pytest.approx(1.5 * 3000 / 448, rel=1e-3)
    assert row["projected_2070s_least_ms"] == pytest.approx(row["projected_2070s_floor_ms"]), "memory is the bottleneck"
    # 16 layers × 128 heads × 1,088 products per token on 320 tensor cores, 32 per clock each, at 1.77 GHz.
    many = dataclasses.replace(case, config=dataclasses.replace(SHIPPED, num_attention_heads=128))
    assert projected_least(many) == pytest.approx(many.floor.weights / 448e9 + 16.114e-3, rel=1e-3)
    text = "\n".join(lines(row, found))
    assert (
        "not measured: floor 9.2" in text
        and "16 ×   62.50  decode" in text
        and "6.00 GB, 5.00 GB of it tensors (within the cap of 8 GB" in text
    )
    over = dataclasses.replace(found, taken=8_010_000_000)
    assert "8.01 GB, 5.00 GB of it tensors (OVER the cap" in "\n".join(lines(values("x", case, over), over))
    for _ in range(2):
        save(row, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        assert [float(line["ratio"]) for line in csv.DictReader(file)] == [row["ratio"]] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", 131073], "context is 131073: the model's max_position_embeddings is 131072"),
        (["--context", 100], "expected more than the 128 new tokens"),
        (["--new-tokens", 0], "new-tokens is 0: expected 1 or more"),
        (["--memory-gb", 0], "--memory-gb is 0.0: expected more than 0"),
        (["--config", "ictx-1b-moe"], "no captured decode step: experts"),
        (["--config", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[object], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ictx(monkeypatch, "bench", "decode", "--config", "ictx-1b-128k", *arguments) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ictx(monkeypatch, "bench", "decode", "--config", "ictx-1b-128k") == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--cache-dtype", "int8"], ["--skip-prefill"]])
def test_a_whole_run(
    options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "row.csv"
    arguments = ["--config", "tiny", "--new-tokens", "8", "--memory-gb", "8", "--chunk-size", "1024", "--out", out]
    assert ictx(monkeypatch, "bench", "decode", *arguments, *options) == 0
    with out.open() as file:
        (row,) = csv.DictReader(file)
    assert 0 < float(row["ms_per_token"]) <= float(row["wall_ms_per_token"]) * 1.05
    assert float(row["peak_gb"]) <= 8 and "ms/token" in capsys.readouterr().out
