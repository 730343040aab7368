"""Registration of a model that was not trained by a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluated import export, ictx
from mlflow import MlflowClient
from test_serve import client, empty_store  # noqa: F401


def test_a_folder_becomes_a_version_that_can_be_pulled(
    client: MlflowClient,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = export(tmp_path / "judge")
    for version in ("1", "2"):
        assert ictx(monkeypatch, "register", folder, "--model", "ictx-judge") == 0
        assert f"models:/ictx-judge@candidate is version {version} now" in capsys.readouterr().out
    run = client.get_run(client.get_model_version("ictx-judge", "2").run_id)
    assert run.info.status == "FINISHED"
    assert ictx(monkeypatch, "pull", "models:/ictx-judge@candidate", "--to", tmp_path / "pulled") == 0
    assert (tmp_path / "pulled/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_folder_without_a_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ictx(monkeypatch, "register", tmp_path, "--model", "x") == 2
    assert capsys.readouterr().err == (
        f"ictx: {tmp_path} is not a model or adapter: it has neither config.json nor adapter_config.json\n"
    )
