"""`ictx bench train`: its rows and estimates, on the CPU with two ranks, compared with transformers."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from models import SMALL

from ictx.bench.train_case import Case, Row
from ictx.bench.train_check import Check
from ictx.bench.train_report import lines, projection
from ictx.cli import main
from ictx.metrics import flops_per_token
from ictx.model import ModelConfig


def ictx(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ictx", *map(str, arguments)])
    return main()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of a small model; ranks use one thread each."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "small.yaml").write_text(json.dumps(SMALL))
    return tmp_path / "small.yaml"


def test_two_ranks_train_beside_transformers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--config", small, "--seq", 32, "--ranks", 2, "--batch", 2, "--steps", 2]
    status = ictx(monkeypatch, "bench", "train", *arguments, "--recompute", "none", "full", "--peer", "--out", out)
    assert status == 0
    rows = [Row(**content) for content in json.loads(out.read_text())]
    assert [(row.implementation, row.recompute) for row in rows] == [
        ("ictx", "none"), ("ictx", "full"), ("transformers", "full"),
    ]  # fmt: skip
    for row in rows:
        assert row.ranks == 2 and row.step and row.tokens_per_second == pytest.approx(2 * 2 * 32 / row.step)
        assert set(row.parts) == {"forward", "backward", "optimizer"} and min(row.parts.values()) > 0
        assert row.mfu is None and row.utilisation is None, "a CPU's peak is unknown"
        # AdamW keeps two values per weight; each rank has half of all weights.
        assert row.memory["optimizer"] >= 2 * row.memory["weights"] and row.memory["gradients"] == row.memory["weights"]
    assert rows[0].loss == pytest.approx(rows[1].loss, rel=1e-5)
    assert rows[0].memory["weights"] == pytest.approx(rows[2].memory["weights"], rel=0.05)
    printed = capsys.readouterr().out
    assert "ictx, torch, recompute full" in printed and "transformers, recompute, eager" in printed


def test_two_ranks_share_out_windows_beside_ddp(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    arguments = ["bench", "train", "--config", small, "--seq", 32, "--ranks", 2, "--out", out]
    shared = [*arguments, "--cp", 2, "--steps", 1, "--warm-up", 1]
    assert ictx(monkeypatch, *shared, "--offload", "--profile") == 0
    (split,) = (Row(**content) for content in json.loads(out.read_text()))
    assert split.step and split.tokens_per_second == pytest.approx(32 / split.step)
    assert (split.cp, split.offload) == (2, True) and "cp 2, offload" in capsys.readouterr().out
    assert ictx(monkeypatch, *arguments, "--steps", 1, "--warm-up", 0, "--recompute", "--ddp") == 0
    (ddp,) = (Row(**content) for content in json.loads(out.read_text()))
    assert (ddp.implementation, ddp.dp_replicate) == ("ddp", 2)
    assert ddp.memory["weights"] == pytest.approx(2 * split.memory["weights"], rel=0.05)
    assert ictx(monkeypatch, *shared, "--check", 1, "--dtype", "float32") == 0
    checks = [Check(**content) for content in json.loads(out.read_text())]
    assert [(one.cp, one.reference_cp) for one in checks] == [(2, 1), (2, 1)]
    assert all(one.error < 1e-5 and one.loss == pytest.approx(one.reference_loss) for one in checks)
    for wrong, message in {
        ("--replicate", 3): "does not make 2 ranks",
        ("--replicate", 0): "dp_replicate is 0",
        ("--cp", 2, "--peer"): "leave --cp out",
    }.items():
        assert ictx(monkeypatch, *arguments, *wrong) != 0
        assert message in capsys.readouterr().err


def test_one_rank_alone_holds_what_it_holds_among_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    arguments = ["bench", "train", "--config", small, "--seq", 32, "--out", out]
    steps = ["--steps", 1, "--warm-up", 1]
    found = {}
    for simulate in ([], ["--simulate"]):
        assert ictx(monkeypatch, *arguments, *steps, "--ranks", 2, "--cp", 2, *simulate) == 0
        (row,) = (Row(**content) for content in json.loads(out.read_text()))
        assert row.simulated == bool(simulate) and row.tokens_per_second == pytest.approx(32 / row.step)
        assert (row.loss is None) == row.simulated
        found[row.simulated] = row
    assert found[True].memory == found[False].memory and found[True].memory["weights"]
    assert "1 of 2 ranks simulated × cpu" in capsys.readouterr().out
    assert ictx(monkeypatch, *arguments, *steps, "--ranks", 8, "--cp", 2, "--replicate", 2, "--simulate") == 0
    (row,) = (Row(**content) for content in json.loads(out.read_text()))
    assert (row.ranks, row.cp, row.dp_replicate) == (8, 2, 2)
    assert row.memory["weights"] == pytest.approx(found[True].memory["weights"] / 2, rel=0.05)
    for wrong, message in {
        ("--cp", 2, "--check", 1): "leave --check",
        ("--replicate", 3): "does not make 2 ranks",
    }.items():
        assert ictx(monkeypatch, *arguments, "--ranks", 2, "--simulate", *wrong) != 0
        assert message in capsys.readouterr().err


@pytest.fixture
def gpus() -> Any:
    """The program benchmarks/gpus.py as a module; it is not part of the package."""
    spec = importlib.util.spec_from_file_location("gpus", Path(__file__).parents[1] / "benchmarks" / "gpus.py")
    assert spec and spec.loader
    gpus = sys.modules["gpus"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpus)
    return gpus


def test_a_case_that_hangs_ends_with_its_ranks_and_the_next_runs(tmp_path: Path, gpus: Any) -> None:
    assert all(0 < case.limit <= 560 for cases in gpus.SETS.values() for case in cases.values())
    # A rank that ignores the end of its launcher: with a rank that fails at once, and after the timeout.
    hangs = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"

    class Case(gpus.Case):  # type: ignore[misc, name-defined]
        @property
        def command(self) -> list[str]:
            return [sys.executable, "-c", self.arguments]

    out = tmp_path / "found.jsonl"
    cases = {
        "hangs": Case(1, 2, hangs),
        "fails": Case(1, 20, "raise SystemExit('no memory')"),
        "late": Case(1, 300, ""),
    }
    gpus.run(cases, time.monotonic() + 40, gpus.Results(out))
    hung, failed, late = (json.loads(line) for line in out.read_text().splitlines())
    assert hung["status"] == "ended after its limit of 2 s"
    status = Path(f"/proc/{hung['output'].strip()}/status")
    assert not status.exists() or "\nState:\tZ" in status.read_text(), "still running"
    assert failed["status"] == "exit 1" and "no memory" in failed["output"] and failed["rows"] == []
    assert late["status"] == "no time left"


def test_the_table_has_a_line_for_each_row_of_each_case(tmp_path: Path, gpus: Any) -> None:
    lines = [
        {
            "case": "a",
            "command": "--seq 8",
            "rows": [{"step": 0.5, "peaks": [1, 2], "memory": {"peak": 3}, "cap": None}],
        },
        {"case": "late", "command": "", "rows": []},
        {"case": "b", "command": "--check 1", "rows": [{"error": 1e-5}, {"error": 0.0}]},
    ]
    (tmp_path / "rows").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gpus.save_csv(tmp_path / "rows", tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text().splitlines() == [
        "case,command,step,peaks,memory.peak,error", "a,--seq 8,0.5,1 2,3,", "b,--check 1,,,,1e-05",
        "b,--check 1,,,,0.0",
    ]  # fmt: skip


CONFIG = ModelConfig(**(SMALL | {"max_position_embeddings": 32768}))
ROW = Row(
    "ictx", "selective", 8, True, 32768, 1, 2, "some GPU", "2.13", attention="cudnn", step=1.0,
    tokens_per_second=65536.0, mfu_causal=0.44, mfu=0.6, utilisation=0.99, loss=10.5,
    parts={"forward": 0.3, "backward": 0.6, "optimizer": 0.1}, memory={"weights": 2 * 10**9, "peak": 17 * 10**9},
)  # fmt: skip


def test_the_table() -> None:
    text = "\n".join(
        lines([ROW, Row("transformers", "full", None, False, 32768, 1, 2, "some GPU", "2.13", note="OOM")])
    )
    assert "2 × some GPU, torch 2.13, 1 × 32,768 tokens per rank and step" in text
    named = next(line for line in text.splitlines() if line.startswith("ictx, cudnn, recompute selective of 8 layers"))
    assert " ".join(named.split()).endswith("1.000 65,536 44.0 % 60.0 % 99 % 17.0 GB –")
    assert "transformers, recompute, eager" in text and "not measured: OOM" in text
    assert "forward 0.300 s, backward 0.600 s, optimizer 0.100 s" in text and "weights 2.00 GB, peak 17.00 GB" in text


def test_the_projection_is_the_share_of_four_cards() -> None:
    case = Case(CONFIG, 32768)
    rate = 4 * 312e12 * 0.44 / flops_per_token(CONFIG, 32768).causal
    (line,) = projection(case, ROW)
    assert f"{rate:,.0f} tokens/s" in line and f"{372e6 / rate / 3600:.2f} to {465e6 / rate / 3600:.2f} h" in line
