"""Several evaluations of a version as one stage: options from a configuration, all metrics in one result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from evaluated import ictx
from mlflow import MlflowClient
from test_evaluate_registered import NAME, TEXT, register
from test_serve import client, empty_store  # noqa: F401

from ictx.evaluate.stage import Command, EvaluationConfig, FolderConfig, planned
from ictx.registry import EVAL_TAG


@pytest.fixture
def stage(client: MlflowClient, tmp_path: Path) -> list[object]:  # noqa: F811
    """The arguments of the stage; version 1 is the champion, version 2 is evaluated."""
    for number in (1, 2):
        register(tmp_path / f"runs/{number}", initializer_range=0.02 * number)
    client.set_registered_model_alias(NAME, "champion", "1")
    (tmp_path / "text").write_text(TEXT)
    evaluations = {
        "perplexity": {"files": [str(tmp_path / "text")], "length": 64, "samples": 3},
        "needle": {"lengths": [128], "depths": [0, 1], "samples": 1},
    }
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump({"also": ["champion", "nobody"], "evaluations": evaluations}))
    words = ["eval", "run", "--config", tmp_path / "eval.yaml", "--set", f"run.dir={tmp_path}/out", "--set"]
    return [*words, f"init=models:/{NAME}@candidate"]


def test_all_are_done_of_the_version_and_of_the_champion_on_the_same_samples(
    client: MlflowClient, stage: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    assert ictx(monkeypatch, *stage) == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert (result["model_name"], result["model_version"]) == (NAME, "2")
    tags = {number: client.get_model_version(NAME, number).tags for number in ("1", "2")}
    for name in ("perplexity", "needle"):
        assert tags["2"][f"{EVAL_TAG}{name}"] == f"{result['metrics'][name]:.6g}"
        assert tags["1"][f"{EVAL_TAG}{name}.measured"] == tags["2"][f"{EVAL_TAG}{name}.measured"]
        assert tags["1"][f"{EVAL_TAG}{name}.run_id"] != tags["2"][f"{EVAL_TAG}{name}.run_id"]


def test_what_is_wrong_with_one_of_them_shows_before_the_first_is_done(
    stage: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        ictx(monkeypatch, *stage, "--set", "evaluations.needle.lenghts=[64]")
    assert "unrecognized arguments: --lenghts 64" in capsys.readouterr().err
    assert not (tmp_path / "out/evals").exists()


def test_an_alias_of_the_model_is_what_it_is_judged_against(
    stage: list[object], client: MlflowClient, tmp_path: Path  # noqa: F811
) -> None:
    def against(alias: str) -> list[object]:
        evaluations = {"judge": {"against": f"@{alias}"}}
        config = EvaluationConfig(f"models:/{NAME}/2", FolderConfig(tmp_path / "judged"), evaluations, ("champion",))
        return [command.options.get("against") for command in planned(config)[1]]

    assert against("champion") == [f"models:/{NAME}/1", None]
    assert against("candidate") == against("nobody") == [None, None]
    # After a restart it is compared with the same version.
    client.set_registered_model_alias(NAME, "champion", "2")
    assert against("champion") == [f"models:/{NAME}/1", None]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("init=models:/nothing/1", "models:/nothing/1 does not exist"),
        ("init=7", "setting init is 7: expected str"),
        ("evaluations={}", "evaluations is empty: expected commands"),
        ("also=champion", "setting also is 'champion': expected a list"),
    ],
)
def test_a_wrong_setting_is_one_line(
    stage: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert ictx(monkeypatch, *stage, "--set", setting) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_options_are_words_of_the_command_line(tmp_path: Path) -> None:
    options = {"lengths": [64, 128], "chunk_size": 16, "beyond": True, "no_log": False, "dtype": None}
    assert Command("needle", "models:/a/1", tmp_path, options).words() == [
        *("needle", "--model", "models:/a/1", "--out", str(tmp_path)),
        *("--lengths", "64", "128", "--chunk-size", "16", "--beyond"),
    ]
