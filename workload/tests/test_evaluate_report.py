"""`ictx eval report`: all results in Markdown and HTML, with the pictures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from evaluated import export, ictx

from ictx.evaluate import plots
from ictx.evaluate.results import Result

ODD = "a|b<script>alert(1)</script>"


def measured(folder: Path) -> None:
    """Writes the results of two evaluations, of a model with special characters in its name."""
    grid = [{"length": n, "depth": depth, "found": depth} for n in (64, 128) for depth in (0.0, 1.0)]
    metrics = {"needle": 0.5, "needle_low": 0.2, "needle_high": 0.8, "needle_nats": 1.25}
    (folder / "needle").mkdir(parents=True)
    Result("needle", ODD, {"lengths": [64, 128]}, metrics, {"grid": grid}).write(folder / "needle")
    plots.heat_map(folder / "needle/needle.png", "needles", grid, "found")
    (folder / "judge").mkdir()
    details = {"worth": "the judge may be no better than chance", "grades": {"answers": 6, "unparsed": 2}}
    Result("judge", ODD, {}, {"judge_score": float("nan")}, details).write(folder / "judge")
    # The result of a pipeline's stage in the parent folder is not an evaluation.
    (folder / "result.json").write_text('{"stage": "eval"}')


def test_numbers_intervals_tables_and_pictures_are_in_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(tmp_path / "evals")
    assert ictx(monkeypatch, "eval", "report", tmp_path / "evals", "--out", tmp_path / "report") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report/report.md")
    text, page = ((tmp_path / f"report/report.{kind}").read_text() for kind in ("md", "html"))
    assert "| needle | 0.5 | 0.2 to 0.8 |" in text and "| needle_nats | 1.25 |  |" in text
    assert "| 128 | 1 | 1 |" in text and "| unparsed | 2 |" in text and "| judge_score | None |" in text
    assert "The judge may be no better than chance." in text
    (picture,) = re.findall(r"!\[.*\]\((.*\.png)\)", text)
    assert (tmp_path / "report" / picture).stat().st_size > 1000 and f'src="{picture}"' in page
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "<td>0.2 to 0.8</td>" in page


def test_the_report_of_a_real_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = export(tmp_path / "model")
    (tmp_path / "text").write_text("The grass is green. " * 100)
    command = ["eval", "perplexity", "--model", model, "--files", tmp_path / "text", "--length", 100, "--samples", 2]
    assert ictx(monkeypatch, *command, "--out", tmp_path / "evals/perplexity") == 0
    assert ictx(monkeypatch, "eval", "report", tmp_path / "evals", "--out", tmp_path / "report") == 0
    assert "| perplexity |" in (tmp_path / "report/report.md").read_text()
    # A second report does not include pictures of the first one.
    assert ictx(monkeypatch, "eval", "report", tmp_path, "--out", tmp_path / "report") == 0
    assert len(list((tmp_path / "report").glob("*.png"))) == 1


def test_nothing_measured_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ictx(monkeypatch, "eval", "report", tmp_path, "--out", tmp_path / "report") == 2
    assert "no results of `ictx eval` below" in capsys.readouterr().err
    (tmp_path / "result.json").write_text('{"kind": "perplexity"}')
    assert ictx(monkeypatch, "eval", "report", tmp_path, "--out", tmp_path / "report") == 2
    assert "result.json is not a result of `ictx eval`" in capsys.readouterr().err
