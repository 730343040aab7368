"""Longer contexts: each stage uses more context than the one before; transformers gives its export's logits."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Commands
from test_pretrain import curve, result_of, wait_for_step
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from ictx.errors import UserError
from ictx.model import Transformer
from ictx.model.hf import load_pretrained
from ictx.train.child import main
from ictx.train.config import load, read
from ictx.train.extend import Extension
from ictx.train.pretrain import main as pretrain

LENGTH = 32
"""Tokens of the parent's windows."""
STAGE = f"""
model: {{yarn: {{original_max_position_embeddings: {LENGTH}}}}}
data: {{long_documents: {{tokens: 64, weight: 4}}}}
train: {{steps: 30, sequence_length: {LENGTH}, batch_size: 8, dtype: float32, log_every: 1, validate_every: 30,
         validation_windows: 32, checkpoint_every: 10}}
optimizer: {{learning_rate: 3.0e-3, warmup_steps: 3}}
run: {{model_name: ""}}
"""


def settings(commands: Commands, prepared: Path, parent: Path, run: Path, factor: int, *further: str) -> list[str]:
    """Returns the arguments that extend the context of a run's model to `factor` times the first length."""
    (commands.folder / "extend.yaml").write_text(STAGE)
    wanted = [f"init=run:{parent}", f"run.dir={run}", f"data.dir={prepared}"]
    return [*wanted, f"model.yarn.factor={factor}", f"train.sequence_length={factor * LENGTH}", *further]


def extend(commands: Commands, *wanted: str) -> int:
    return main(Extension, read(str(commands.folder / "extend.yaml"), list(wanted)))


@pytest.fixture(scope="module")
def chain(commands: Commands, prepared: Path) -> list[Path]:
    """A pretraining run, and two stages with two and four times its context."""
    runs = [commands.folder / f"chain-{number}" for number in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", commands.tracking_uri)
        wanted = [f"run.dir={runs[0]}", f"data.dir={prepared}", "run.model_name=", "train.steps=90"]
        assert pretrain(load(str(commands.folder / "test.yaml"), wanted)) == 0
        for number, factor in ((1, 2), (2, 4)):
            further = settings(commands, prepared, runs[number - 1], runs[number], factor)
            assert extend(commands, *further, "train.mask_documents=false") == 0
    return runs


def windows(prepared: Path, length: int, count: int = 24) -> torch.Tensor:
    """Returns windows of the validation data with a token for the last target, (count, length + 1)."""
    tokens = np.fromfile(prepared / "validation-00000.bin", "<u2").astype(np.int64)
    step = (len(tokens) - 1 - length) // count
    return torch.from_numpy(np.stack([tokens[number * step :][: length + 1] for number in range(count)]))


def losses(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Returns the mean loss at each position, (length,)."""
    with torch.no_grad():
        logits = model(tokens[:, :-1])
    return cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(0)


def test_each_stage_reads_further_than_the_one_before(chain: list[Path], prepared: Path) -> None:
    tokens = windows(prepared, 4 * LENGTH)
    first, second, third = (losses(load_pretrained(run / "export"), tokens) for run in chain)
    assert third.isfinite().all()
    # At positions beyond the context of the earlier stages.
    assert second[LENGTH : 2 * LENGTH].mean() < first[LENGTH : 2 * LENGTH].mean() - 0.02
    assert third[2 * LENGTH :].mean() < second[2 * LENGTH :].mean() - 0.02
    assert third[2 * LENGTH :].mean() < first[2 * LENGTH :].mean() - 0.02
    results = [result_of(run) for run in chain]
    assert [result["stage"] for result in results] == ["pretrain", "extend", "extend"]
    assert [result["parent"] for result in results] == ["", *(f"run:{run}" for run in chain[:2])]


def test_the_export_is_the_model_that_transformers_computes(chain: list[Path], prepared: Path) -> None:
    tokens = windows(prepared, 4 * LENGTH, 4)[:, :-1]
    theirs = AutoModelForCausalLM.from_pretrained(chain[2] / "export", dtype=torch.float32)
    assert theirs.config.max_position_embeddings == 4 * LENGTH
    assert theirs.config.rope_parameters["factor"] == 4
    with torch.no_grad():
        torch.testing.assert_close(
            load_pretrained(chain[2] / "export")(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.yarn.factor=2"], r"model.yarn.factor is 2: expected at least that of run:.*, 4"),
        (["model.yarn=null"], r"model.yarn is None, but run:.* has .*: leave it out"),
        (
            ["model.yarn.original_max_position_embeddings=64"],
            r"model.yarn.original_max_position_embeddings is 64, but run:.* has 32: leave it out",
        ),
        (["model.rope_theta=1e6"], r"model.rope_theta is 1000000.0, but run:.* has 10000.0: leave it out"),
        (
            ["model.yarn.factor=4", "train.sequence_length=256"],
            "train.sequence_length is 256, longer than the parent's context of 128 tokens "
            r"\(run:.*\): raise model.yarn.factor",
        ),
        (["model.max_position_embeddings=100", "model.yarn.factor=4"], "is 100: expected yarn.factor × "),
    ],
)
def test_a_stretch_that_does_not_fit_is_refused(
    commands: Commands,
    chain: list[Path],
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", commands.tracking_uri)
    wanted = settings(commands, prepared, chain[2], tmp_path, 1)
    with pytest.raises(UserError, match=message):
        extend(commands, *(each for each in wanted if "factor" not in each), *changes)


@pytest.mark.parametrize("blow", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.full)])
def test_a_run_that_ends_early_goes_on_as_if_it_had_not(
    commands: Commands, chain: list[Path], prepared: Path, tmp_path: Path, blow: signal.Signals
) -> None:
    parent, run = shutil.copytree(chain[0], tmp_path / "parent"), tmp_path / "run"
    wanted = settings(commands, prepared, parent, run, 2, "train.mask_documents=false")
    arguments = ["train", "extend", "--config", commands.folder / "extend.yaml", *(f"--set={each}" for each in wanted)]
    process = commands.start(*arguments)
    wait_for_step(run, 13, [process])
    process.send_signal(blow)
    assert commands.end(process).status == (75 if blow == signal.SIGTERM else -signal.SIGKILL)
    # The run keeps its initial model, so the parent may be deleted.
    shutil.rmtree(parent)
    ended = commands.run(*arguments)
    assert ended.status == 0, ended.err
    assert result_of(run)["resumed_from_step"] >= (13 if blow == signal.SIGTERM else 10)
    assert curve(run) == curve(chain[1]), "bitwise equal"
