"""Preference optimization: both engines give the same losses, resume exactly, and raise the reward margin."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import Commands
from safetensors.torch import load_file

from ictx.cli import parser
from ictx.data.tokenizer import save_tokenizer, train_tokenizer
from ictx.model import ModelConfig, Transformer
from ictx.model.hf import save_pretrained
from ictx.train.child import main
from ictx.train.config import read
from ictx.train.dpo import Preference
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
    """Writes the folder of a run with random weights, whose export is the initial model."""
    (folder / "tokenizer").mkdir(parents=True)
    save_tokenizer(train_tokenizer(texts, config.vocab_size), folder / "tokenizer")
    model = Transformer(config)
    model.init_weights(5)
    save_pretrained(model, folder / "export", folder / "tokenizer")
    (folder / "result.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def start(commands: Commands) -> Any:
    """Returns a function that returns the arguments of a run in a folder, with the tests' parent and data."""
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
    """Returns the values of a metric by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="session")
def train(commands: Commands, start: Any) -> Callable[..., Path]:
    """Returns a function that trains in this process, which imports TRL only once, and returns the run's folder."""

    def run(folder: Path, *settings: str) -> Path:
        words, threads = parser().parse_args([*map(str, start(folder, *settings))]), torch.get_num_threads()
        torch.set_num_threads(1)  # as in the processes of `commands`
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", commands.tracking_uri)
            patch.setenv("TQDM_DISABLE", "1")
            try:
                assert main(Preference, read(words.config, words.set)) == 0
            finally:
                AcceleratorState._reset_state(reset_partial_state=True)  # for trainers of other tests
                torch.set_num_threads(threads)
        return folder

    return run


@pytest.fixture(scope="session")
def with_trl(commands: Commands, train: Callable[..., Path]) -> Path:
    """An uninterrupted run with TRL."""
    return train(commands.folder / "dpo" / "trl")


@pytest.fixture(scope="session")
def with_ictx(commands: Commands, train: Callable[..., Path]) -> Path:
    """The same run with our loop."""
    return train(commands.folder / "dpo" / "ictx", "dpo.engine=ictx")


def test_our_loop_has_the_losses_of_trl(with_trl: Path, with_ictx: Path) -> None:
    ours = with_ictx
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


def test_an_adapter_is_the_same_of_both_engines_and_exported_merged_and_as_peft_reads_it(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = ["train.lora={rank: 4, alpha: 8}", "optimizer.learning_rate=0.02"]
    runs = [train(tmp_path / engine, f"dpo.engine={engine}", *lora) for engine in ("trl", "ictx")]
    for name in ("loss", "validation_loss", "rewards/margins", "gradient_norm"):
        wanted = records(runs[0], name)
        wanted.pop(0, None)
        assert records(runs[1], name) == pytest.approx(wanted, abs=1e-4, rel=1e-4), name
    tokens = torch.arange(40)[None]
    for run in runs:
        base, merged = (
            AutoModelForCausalLM.from_pretrained(run / folder, dtype=torch.float32) for folder in ("init", "export")
        )
        with torch.no_grad():
            before, wanted = base(tokens).logits, merged(tokens).logits
            found = PeftModel.from_pretrained(base, run / "adapter")(tokens).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert (found - before).abs().max() > 0.1
    kept, learned = (
        load_file(runs[0] / name) for name in ("export/model.safetensors", "adapter/adapter_model.safetensors")
    )
    first = load_file(runs[0] / "init" / "model.safetensors")
    names = {name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in learned}
    assert len(names) == 2 * 8, "q_a, q_b, kv_a, kv_b, o, gate, up and down of two layers"
    for name, weight in kept.items():
        assert torch.equal(weight, first[name]) == (name.removesuffix(".weight") not in names), name


def test_sigterm_saves_and_a_restart_goes_on(
    commands: Commands, start: Any, train: Callable[..., Path], with_trl: Path
) -> None:
    run = with_trl.parent / "stopped"
    process = commands.start(*start(run, "train.checkpoint_every=100"))
    printed(process, "step 1/")
    process.send_signal(signal.SIGTERM)
    assert commands.end(process).status == 75
    assert not (run / "result.json").exists()
    (saved,) = (run / "checkpoints").iterdir()
    assert saved.name in ("step-00000001", "step-00000002", "step-00000003")
    train(run)
    assert json.loads((run / "result.json").read_text())["resumed_from_step"] == int(saved.name[-8:])
    for name in ("loss", "validation_loss", "rewards/margins", "learning_rate"):
        assert records(run, name) == records(with_trl, name), name


@pytest.mark.full
@pytest.mark.parametrize("engine", ["trl", "ictx"])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_ends_early_goes_on_as_if_it_had_not(
    commands: Commands, start: Any, train: Callable[..., Path], tmp_path: Path, engine: str, blow: signal.Signals
) -> None:
    """With dropout in the adapter, which needs random numbers, and a backward that recomputes it."""
    settings = [f"dpo.engine={engine}", "train.steps=6", "train.lora={rank: 4, dropout: 0.2}", "train.recompute=full"]
    process = commands.start(*start(tmp_path / "run", *settings))
    printed(process, "saved ")
    process.send_signal(blow)
    assert commands.end(process).status == (75 if blow == signal.SIGTERM else -signal.SIGKILL)
    assert not (tmp_path / "run" / "result.json").exists()
    for name in ("run", "whole"):
        train(tmp_path / name, *settings)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "whole")]
    assert results[0]["resumed_from_step"] >= 2 and results[1]["resumed_from_step"] == 0
    for name in ("final_loss", "val_loss", "reward_margin", "tokens"):
        assert results[0][name] == results[1][name], name
    for name in ("loss", "gradient_norm"):
        assert records(tmp_path / "run", name) == records(tmp_path / "whole", name), name


@pytest.mark.full
@pytest.mark.parametrize("engine", ["trl", "ictx"])
def test_a_lost_rank_ends_the_job_and_the_next_start_goes_on(
    commands: Commands, start: Any, tmp_path: Path, engine: str
) -> None:
    settings = [f"dpo.engine={engine}", "train.accumulate=1", "train.steps=6", "train.timeout=60"]
    ranks = commands.ranks(2, *start(tmp_path / "run", *settings))
    printed(ranks[0], "saved ")
    ranks[1].kill()
    left, lost = (commands.end(rank) for rank in ranks)
    assert (left.status, lost.status) == (2, -signal.SIGKILL), left.err
    assert left.err.splitlines()[-1].startswith("ictx: a rank has exited or does not respond"), left.err
    for name in ("run", "whole"):
        for ended in [commands.end(rank) for rank in commands.ranks(2, *start(tmp_path / name, *settings))]:
            assert ended.status == 0, ended.err
    assert records(tmp_path / "run", "loss") == records(tmp_path / "whole", "loss")


def printed(process: subprocess.Popen[str], text: str) -> None:
    """Waits until a process has printed the text."""
    assert process.stdout
    while text not in (line := process.stdout.readline()):
        assert line, process.communicate()


@pytest.mark.full
@pytest.mark.parametrize("engine", ["trl", "ictx"])
def test_rewards_are_relative_to_another_model(train: Callable[..., Path], tmp_path: Path, engine: str) -> None:
    """With a reference that was trained on other answers, rewards of the initial model are not 0."""
    other = train(tmp_path / "other", "train.steps=8", "optimizer.learning_rate=1e-2", "run.model_name=")
    train(tmp_path / "run", f"dpo.engine={engine}", f"dpo.reference=run:{other}")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    learned = json.loads((other / "result.json").read_text())
    assert result["reference"] == f"run:{other}"
    # The parent's margin against the reference is the negative of the reference's margin against the parent.
    assert result["reward_margin_before"] == pytest.approx(-learned["reward_margin"], abs=1e-4)
    assert result["reward_margin"] > result["reward_margin_before"]


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
    # A pair is skipped if its answers are cut off, or are equal after the cut.
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
        (["train.sequence_length=256"], "longer than the parent's context of 128 tokens"),
        (["dpo.loss=other"], "setting dpo.loss is 'other': expected one of sigmoid, ipo, hinge"),
        (["dpo.engine=trl", "optimizer.name=muon"], "dpo.engine is trl, which does not support optimizer.name: muon"),
        (["dpo.reference=run:OTHER"], "whose vocabulary differs from that of run:"),
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
@pytest.mark.parametrize("lora", ["null", "{rank: 4}"])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_twenty_steps_have_the_losses_of_trl(train: Callable[..., Path], tmp_path: Path, loss: str, lora: str) -> None:
    # With IPO's beta of 0.1, a target of 5 nats per token, rounding errors grow with each step.
    settings = (f"dpo.loss={loss}", f"dpo.beta={1.0 if loss == 'ipo' else 0.1}", "train.steps=20", f"train.lora={lora}")
    for engine in ("trl", "ictx"):
        train(tmp_path / engine, f"dpo.engine={engine}", "train.recompute=selective", *settings)
    wanted = records(tmp_path / "trl", "loss")
    assert len(wanted) == 20
    assert records(tmp_path / "ictx", "loss") == pytest.approx(wanted, abs=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("settings", [["dpo.engine=trl"], ["dpo.engine=ictx"], ["parallel.cp=2"]], ids=str)
def test_two_ranks_have_the_losses_of_one(
    commands: Commands, start: Any, train: Callable[..., Path], tmp_path: Path, with_trl: Path, settings: list[str]
) -> None:
    shared = "parallel.cp=2" in settings
    more = [*settings, "train.accumulate=2" if shared else "train.accumulate=1"]
    model = (
        ["init=run:" + str(parent_in(tmp_path / "even", [Path(__file__).read_text()], two_heads()))] if shared else []
    )
    alone = with_trl
    if shared:
        alone = train(tmp_path / "alone", "dpo.engine=ictx", *model)
    run = tmp_path / "run"
    for ended in [commands.end(process) for process in commands.ranks(2, *start(run, *more, *model))]:
        assert ended.status == 0, ended.err
    assert records(run, "loss") == pytest.approx(records(alone, "loss"), abs=1e-4)
    assert records(run, "validation_loss")[4] == pytest.approx(records(alone, "validation_loss")[4], abs=1e-4)


def two_heads() -> ModelConfig:
    """Returns a model with heads for two ranks."""
    from dataclasses import replace

    return replace(MODEL, num_attention_heads=2)


@pytest.mark.full
def test_docstrings_raise_the_held_out_margin(commands: Commands, tmp_path: Path) -> None:
    """With the shipped recipe on the standard library, in fewer and shorter steps, from random weights."""
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
    # With the recipe's rate these steps give about 0.07; its 60 steps from a pretrained model give 0.3.
    assert result["reward_margin_before"] == 0 and result["reward_margin"] > 0.04
    assert result["reward_accuracy"] > 0.55
    assert result["val_loss"] < 0.685, "chance is ln 2 = 0.693"
