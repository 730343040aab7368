"""Preference optimization: both engines train alike, stop and go on, and raise the rewards' margin."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Commands

from ictx.data.tokenizer import save_tokenizer, train_tokenizer
from ictx.model import ModelConfig, Transformer
from ictx.model.hf import save_pretrained
from ictx.train.dpo_pairs import load_tokenizer, places, tokenized

MODEL = ModelConfig(
    vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, q_lora_rank=16,
    max_position_embeddings=128, initializer_range=0.1,
)  # fmt: skip
SETTINGS = """
data: {kind: dpo, validation_share: 0.25}
train: {steps: 4, sequence_length: 48, batch_size: 2, accumulate: 2, dtype: float32, recompute: none, log_every: 1,
        validate_every: 2, validation_windows: 8, checkpoint_every: 2}
optimizer: {learning_rate: 3.0e-3, warmup_steps: 2}
run: {experiment: dpo, model_name: ictx-dpo}
"""


def parent_in(folder: Path, texts: list[str], config: ModelConfig = MODEL) -> Path:
    """Makes what a run of random weights leaves: its export is a model to begin with."""
    (folder / "tokenizer").mkdir(parents=True)
    save_tokenizer(train_tokenizer(texts, config.vocab_size), folder / "tokenizer")
    model = Transformer(config)
    model.init_weights(5)
    save_pretrained(model, folder / "export", folder / "tokenizer")
    (folder / "result.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def start(commands: Commands) -> Any:
    """Returns what makes the arguments of a run in a folder, with the parent and the data of all tests."""
    folder = commands.folder / "dpo"
    words = ["red", "green", "blue", "black", "white", "grey"]
    rows = [
        {"prompt": f"Colour {number}?", "chosen": f"It is {words[number % 6]}.", "rejected": f"No {words[number % 5]}"}
        for number in range(48)
    ]
    parent = parent_in(folder / "parent", [" ".join(row.values()) for row in rows])
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "dpo.yaml").write_text(SETTINGS)
    config = ["--config", folder / "dpo.yaml"]
    ended = commands.run(
        "data", "prepare", *config, "--corpus", folder / "rows.jsonl", "--out", folder / "data", "--link", folder / "l"
    )
    assert ended.status == 0, ended.err

    def arguments(run: Path, *settings: str) -> list[object]:
        wanted = [f"run.dir={run}", f"data.dir={folder / 'l'}", f"init=run:{parent}", *settings]
        return ["train", "dpo", *config, *(f"--set={value}" for value in wanted)]

    return arguments


def records(run: Path, name: str) -> dict[int, float]:
    """Returns a measure by its step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="session")
def with_trl(commands: Commands, start: Any) -> Path:
    """A run with TRL that nothing interrupted."""
    run = commands.folder / "dpo" / "trl"
    ended = commands.run(*start(run))
    assert ended.status == 0, ended.err
    return run


def test_our_loop_has_the_losses_of_trl(commands: Commands, start: Any, with_trl: Path) -> None:
    ours = with_trl.parent / "ictx"
    ended = commands.run(*start(ours, "dpo.engine=ictx"))
    assert ended.status == 0, ended.err
    for name in ("loss", "validation_loss", "rewards/margins", "gradient_norm"):
        wanted = records(with_trl, name)
        wanted.pop(0, None)
        assert records(ours, name) == pytest.approx(wanted, abs=1e-4, rel=1e-4), name
    results = [json.loads((run / "result.json").read_text()) for run in (with_trl, ours)]
    assert [result["engine"] for result in results] == ["trl", "ictx"]
    for result in results:
        assert result["stage"] == "dpo" and result["model_version"]
        assert result["reward_margin_before"] == 0 < abs(result["reward_margin"])
    assert results[0]["reward_margin"] == pytest.approx(results[1]["reward_margin"], abs=1e-4)


def test_sigterm_saves_and_a_restart_goes_on(commands: Commands, start: Any, with_trl: Path) -> None:
    run = with_trl.parent / "stopped"
    process = commands.start(*start(run, "train.checkpoint_every=100"))
    assert process.stdout
    for line in process.stdout:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGTERM)
            break
    assert commands.end(process).status == 75
    assert not (run / "result.json").exists()
    (saved,) = (run / "checkpoints").iterdir()
    assert saved.name in ("step-00000001", "step-00000002", "step-00000003")
    ended = commands.run(*start(run))
    assert ended.status == 0, ended.err
    assert f"resuming after step {int(saved.name[-8:])}" in ended.out
    for name in ("loss", "validation_loss", "rewards/margins", "learning_rate"):
        assert records(run, name) == records(with_trl, name), name


def test_pairs_are_the_tokens_that_trl_makes(with_trl: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    tokenizer = load_tokenizer(with_trl / "init")
    said = {"prompt": [("user", "red?")], "chosen": [("assistant", "It is red.")], "rejected": [("assistant", "It")]}
    row = {name: [{"role": role, "content": text} for role, text in turns] for name, turns in said.items()}
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
    settings = DPOConfig(max_length=48, use_cpu=True, bf16=False, output_dir="unused")
    (wanted,) = DPOTrainer._prepare_dataset(trainer, Dataset.from_list([row]), tokenizer, settings, "train")
    assert tokenized(tokenizer, row, 48) == {
        name: wanted[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    }
    # Where the answers are cut off, or are cut to the same, there is nothing to learn.
    assert tokenized(tokenizer, row, len(wanted["prompt_ids"]) + 1) is None


def test_each_pair_comes_once_an_epoch() -> None:
    order = places(7, 3, 0, 21)
    assert [sorted(order[first : first + 7]) for first in (0, 7, 14)] == [[*range(7)]] * 3
    assert len({tuple(order[first : first + 7]) for first in (0, 7, 14)}) == 3
    assert places(7, 3, 5, 9) == order[5:14]
    assert places(7, 4, 0, 7) != order[:7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.sequence_length=256"], "a context longer than the parent's stretch allows, which is 128 tokens"),
        (["dpo.loss=other"], "setting dpo.loss is 'other': expected one of sigmoid, ipo, hinge"),
        (["dpo.engine=trl", "optimizer.name=muon"], "dpo.engine is trl, which cannot do optimizer.name: muon"),
        (["dpo.reference=run:OTHER"], "which has another vocabulary than run:"),
        (["init=run:BARE"], "has no chat template"),
    ],
)
@pytest.mark.full
def test_what_cannot_be_is_one_line(
    commands: Commands, start: Any, tmp_path: Path, settings: list[str], message: str
) -> None:
    for name in ("OTHER", "BARE"):
        if any(name in setting for setting in settings):
            other = parent_in(tmp_path / name, [Path(__file__).read_text()])
            settings = [setting.replace(name, str(other)) for setting in settings]
            if name == "BARE":
                config = other / "export" / "tokenizer_config.json"
                content = json.loads(config.read_text())
                del content["chat_template"]
                config.write_text(json.dumps(content))
    ended = commands.run(*start(tmp_path / "run", *settings))
    assert ended.status == 2
    assert message in ended.err.splitlines()[-1]
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_without_trl_there_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from ictx.errors import UserError
    from ictx.train import dpo

    monkeypatch.setattr(dpo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="trl is not installed: install it"):
        dpo.require_trl()


@pytest.mark.full
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_twenty_steps_have_the_losses_of_trl(commands: Commands, start: Any, tmp_path: Path, loss: str) -> None:
    # With IPO's target of 5 nats a token, which 0.1 means, rounding grows from step to step.
    settings = (f"dpo.loss={loss}", f"dpo.beta={1.0 if loss == 'ipo' else 0.1}", "train.steps=20")
    for engine in ("trl", "ictx"):
        ended = commands.run(*start(tmp_path / engine, f"dpo.engine={engine}", "train.recompute=selective", *settings))
        assert ended.status == 0, ended.err
    wanted = records(tmp_path / "trl", "loss")
    assert len(wanted) == 20
    assert records(tmp_path / "ictx", "loss") == pytest.approx(wanted, abs=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("settings", [["dpo.engine=trl"], ["dpo.engine=ictx"], ["parallel.cp=2"]], ids=str)
def test_two_ranks_have_the_losses_of_one(
    commands: Commands, start: Any, tmp_path: Path, with_trl: Path, settings: list[str]
) -> None:
    shared = "parallel.cp=2" in settings
    more = [*settings, "train.accumulate=2" if shared else "train.accumulate=1"]
    model = (
        ["init=run:" + str(parent_in(tmp_path / "even", [Path(__file__).read_text()], two_heads()))] if shared else []
    )
    alone = with_trl
    if shared:
        alone = tmp_path / "alone"
        ended = commands.run(*start(alone, "dpo.engine=ictx", *model))
        assert ended.status == 0, ended.err
    run = tmp_path / "run"
    for ended in [commands.end(process) for process in commands.ranks(2, *start(run, *more, *model))]:
        assert ended.status == 0, ended.err
    assert records(run, "loss") == pytest.approx(records(alone, "loss"), abs=1e-4)
    assert records(run, "validation_loss")[4] == pytest.approx(records(alone, "validation_loss")[4], abs=1e-4)


def two_heads() -> ModelConfig:
    """Returns a model whose heads two ranks can share out."""
    from dataclasses import replace

    return replace(MODEL, num_attention_heads=2)


@pytest.mark.full
def test_docstrings_raise_the_held_out_margin(commands: Commands, tmp_path: Path) -> None:
    """With the shipped recipe, on the standard library."""
    config = ["--config", "dpo/tiny.yaml"]
    ended = commands.run("data", "prepare", *config, "--corpus", "stdlib", "--out", tmp_path, "--link", tmp_path / "d")
    assert ended.status == 0, ended.err
    texts = (tmp_path / "d" / "train.jsonl").read_text().splitlines()[:2000]
    parent = parent_in(tmp_path / "parent", texts, ModelConfig.named("tiny"))
    run = tmp_path / "run"
    settings = [f"run.dir={run}", f"data.dir={tmp_path / 'd'}", f"init=run:{parent}", "run.model_name=ictx-docs"]
    settings += ["train.steps=24", "train.sequence_length=256", "train.log_every=8"]
    ended = commands.run("train", "dpo", *config, *(f"--set={value}" for value in settings))
    assert ended.status == 0, ended.err
    result = json.loads((run / "result.json").read_text())
    assert result["reward_margin_before"] == 0 and result["reward_margin"] > 0.1
    assert result["reward_accuracy"] > 0.5
    assert result["val_loss"] < 0.6931
