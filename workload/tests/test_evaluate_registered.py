"""Evaluation of a registered version: its tags, an MLflow run with the results, and the gate."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluated import export, ictx
from mlflow import MlflowClient
from test_serve import client, empty_store  # noqa: F401

from ictx.evaluate.subject import find
from ictx.registry import EVAL_TAG, VERSION_TAG
from ictx.track.mlflow import Tracker

NAME = "ictx-evaluated"
TEXT = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 30


def register(folder: Path, **changes: object) -> str:
    export(folder / "export", **changes)
    return Tracker(folder, "test", {}, patience=0).register(folder / "export", NAME, "candidate")


@pytest.fixture
def command(client: MlflowClient, tmp_path: Path) -> list[object]:  # noqa: F811
    register(tmp_path / "runs/1")
    (tmp_path / "text").write_text(TEXT)
    return ["eval", "perplexity", "--files", tmp_path / "text", "--length", 64, "--samples", 3, "--model"]


def test_what_was_measured_is_on_the_version_and_opens_the_gate(
    client: MlflowClient, command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    promote = ["promote", "candidate", "--alias", "champion"]
    assert ictx(monkeypatch, *promote) == 3
    assert ictx(monkeypatch, *command, f"models:/{NAME}@candidate", "--out", tmp_path / "out") == 0
    assert f"logged on models:/{NAME}/1, tables and pictures in MLflow run" in capsys.readouterr().out
    tags = client.get_model_version(NAME, "1").tags
    run = client.get_run(tags[f"{EVAL_TAG}perplexity.run_id"])
    assert float(tags[f"{EVAL_TAG}perplexity"]) == pytest.approx(run.data.metrics["perplexity"], rel=1e-5)
    assert run.data.tags[VERSION_TAG] == f"{NAME}/1" and run.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {
        "perplexity.png", "result.json", "samples.jsonl"}  # fmt: skip
    assert ictx(monkeypatch, *promote) == 0
    # A second evaluation computes nothing and uses the same run.
    assert ictx(monkeypatch, *command, f"models:/{NAME}@candidate", "--out", tmp_path / "out") == 0
    assert client.get_model_version(NAME, "1").tags == client.get_model_version(NAME, "1").tags | {
        f"{EVAL_TAG}perplexity.run_id": run.info.run_id}  # fmt: skip
    # A version with a higher perplexity on the same text is rejected with the metric and its numbers.
    register(tmp_path / "runs/2", initializer_range=2.0)
    assert ictx(monkeypatch, *command, f"models:/{NAME}/2", "--out", tmp_path / "second") == 0
    assert ictx(monkeypatch, *promote) == 3
    assert f"models:/{NAME}/2 is rejected: perplexity is " in capsys.readouterr().err


def test_an_alias_that_moves_meanwhile_changes_nothing(
    client: MlflowClient, command: list[object], tmp_path: Path  # noqa: F811
) -> None:
    out, cache = tmp_path / "out", tmp_path / "models"
    first = find(f"models:/{NAME}@candidate", out, cache)
    register(tmp_path / "runs/2", initializer_range=0.2)
    again, elsewhere = find(f"models:/{NAME}@candidate", out, cache), find(f"models:/{NAME}@candidate", cache, cache)
    assert str(first) == str(again) == f"models:/{NAME}/1" and str(elsewhere) == f"models:/{NAME}/2"
    assert first.digest == again.digest != elsewhere.digest


@pytest.mark.parametrize("uri", [f"models:/{NAME}/9", f"models:/{NAME}@nobody", "models:/nothing/1"])
def test_a_version_that_does_not_exist_is_one_line(
    command: list[object], tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ictx(monkeypatch, *command, uri, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert f"{uri} does not exist" in printed and printed.count("\n") == 1
