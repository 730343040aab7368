"""lm-evaluation-harness against an endpoint, offline: custom tasks, and missing downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from endpoint import Server, serving
from evaluated import export, ictx

CAPITALS = {"France": "Paris", "Italy": "Rome"}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {file}}}
test_split: train
output_type: generate_until
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_target: "{{{{capital}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    export(tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    rows = [json.dumps({"country": country, "capital": capital}) for country, capital in CAPITALS.items()]
    (tmp_path / "tasks/rows.jsonl").write_text("\n".join(rows) + "\n")
    for name in ("capitals", "again"):
        text = TASK.format(name=name, file=tmp_path / "tasks/rows.jsonl")
        (tmp_path / f"tasks/{name}.yaml").write_text(text)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path


def knows_one(body: dict[str, Any]) -> Any:
    """Responds with Paris to every prompt; prompts are tokens, which are bytes."""
    prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
    choices = [{"index": place, "text": "Paris"} for place in range(len(prompts))]
    return 200, {}, json.dumps({"choices": choices}).encode()


# The harness reads thousands of files to list its tasks.
@pytest.mark.full
def test_tasks_of_one_s_own_are_measured_without_a_network_and_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Server(answer=knows_one, key="k")) as server:
        command = ["eval", "harness", "--model", folder / "model", "--endpoint", server.url, "--out", folder / "out"]
        command += ["--key-env", "KEY", "--tasks-dir", folder / "tasks", "--samples", 0, "--tasks"]
        monkeypatch.setenv("KEY", "k")
        assert ictx(monkeypatch, *command, "capitals", "nosuch") == 2
        assert "task nosuch does not exist in lm-eval 0.4.13" in capsys.readouterr().err
        (folder / "out/settings.json").unlink()
        assert ictx(monkeypatch, *command, "capitals") == 0
        asked = len(server.asked)
        assert asked == 2 and all(body["model"] == "judge" for body in server.asked)
        assert ictx(monkeypatch, *command, "capitals") == 0
        assert len(server.asked) == asked
    metrics = json.loads((folder / "out/result.json").read_text())["metrics"]
    assert metrics == {"harness.capitals.exact_match": 0.5}
    assert (folder / "out/harness.png").stat().st_size > 1000


@pytest.mark.full
def test_what_must_be_downloaded_is_one_line_without_a_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Server(answer=knows_one)) as server:
        command = ["eval", "harness", "--model", folder / "model", "--endpoint", server.url, "--out", folder / "out"]
        # `datasets`, which may be imported already, reads the variable on import.
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        assert ictx(monkeypatch, *command, "--tasks", "hellaswag", "--samples", 1) == 2
        printed = capsys.readouterr().err.splitlines()[-1]
        assert printed.startswith("ictx: a task's data cannot be downloaded") and "--tasks-dir" in printed
        for words, reason in (
            (["--samples", "-1"], "samples is -1: expected 0 or more"),
            (["--batch-size", "0"], "batch-size is 0: expected 1 or more"),
            (["--tasks-dir", "/nowhere"], "--tasks-dir is /nowhere: no such folder"),
        ):
            assert ictx(monkeypatch, *command, "--tasks", "capitals", *words) == 2
            assert capsys.readouterr().err.splitlines()[-1] == f"ictx: {reason}"


def test_without_the_harness_one_line_names_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = ["eval", "harness", "--model", folder / "model", "--endpoint", "http://x/v1", "--tasks", "capitals"]
    assert ictx(monkeypatch, *command, "--out", folder / "out") == 2
    assert capsys.readouterr().err.startswith("ictx: lm-eval is not installed: pip install --no-deps --require-hashes")
