"""The initial model of a run: resolved once, verified, and kept; errors are one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, Commands
from mlflow import MlflowClient
from test_data_trust import MALLORY, as_root

from ictx.data.config import DataConfig
from ictx.data.prepare import prepare
from ictx.errors import UserError
from ictx.model.hf import load_pretrained
from ictx.registry import SUMS_FILE
from ictx.train.child import main
from ictx.train.config import load, read
from ictx.train.extend import Extension
from ictx.train.pretrain import main as pretrain

NAME = "ictx-parent"
STILL = ["optimizer.learning_rate=1e-30", "train.steps=1", "train.validation_windows=8"]
"""Settings of a step that changes no weight."""
CHILD = """
train: {steps: 2, sequence_length: 64, batch_size: 4, dtype: float32, log_every: 1, validation_windows: 8}
optimizer: {learning_rate: 1.0e-3, warmup_steps: 1}
"""


@pytest.fixture(scope="module")
def parents(commands: Commands, prepared: Path) -> list[Path]:
    """Two short runs, versions 1 and 2 of NAME, the second with the alias `candidate`."""
    runs = [commands.folder / f"parent-{seed}" for seed in (1, 2)]
    (commands.folder / "child.yaml").write_text(CHILD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", commands.tracking_uri)
        for seed, run in enumerate(runs):
            wanted = [f"run.dir={run}", f"data.dir={prepared}", f"train.seed={seed}", f"run.model_name={NAME}"]
            shorter = ["train.steps=2", "train.validation_windows=8"]
            assert pretrain(load(str(commands.folder / "test.yaml"), [*wanted, *shorter])) == 0
    return runs


@pytest.fixture
def extend(
    commands: Commands, parents: list[Path], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Runs the stage in `tmp_path / "run"`."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", commands.tracking_uri)

    def run(init: str, *settings: str) -> int:
        wanted = [f"init={init}", f"run.dir={tmp_path}/run", f"data.dir={prepared}", "run.model_name=", *settings]
        return main(Extension, read(str(commands.folder / "child.yaml"), wanted))

    return run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(folder).state_dict()


def note(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "init.json").read_text())
    return content


@pytest.mark.parametrize("init", [f"models:/{NAME}/1", f"models:/{NAME}@candidate", "run:{}"])
def test_a_run_begins_with_the_weights_and_the_sizes_that_init_names(
    extend: Callable[..., int], parents: list[Path], tmp_path: Path, init: str
) -> None:
    parent = parents[1 if "@" in init else 0]
    assert extend(init.format(parent), *STILL) == 0
    run = tmp_path / "run"
    for name, weight in weights(parent / "export").items():
        assert torch.equal(weights(run / "export")[name], weight), name
    assert (run / "export" / "tokenizer.json").read_bytes() == (parent / "export" / "tokenizer.json").read_bytes()
    number = "2" if "@" in init else "1"
    origin = f"run:{parent.resolve()}" if init == "run:{}" else f"models:/{NAME}/{number}"
    assert (note(run)["origin"], note(run)["name"], note(run)["version"]) == (origin, NAME, number)
    assert note(run)["run_id"] == json.loads((parent / "result.json").read_text())["mlflow_run_id"]


def test_run_and_version_have_their_lineage(
    commands: Commands, extend: Callable[..., int], parents: list[Path], prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ICTX_IMAGE_REF", "registry/ictx-training:1")
    monkeypatch.setenv("ICTX_IMAGE_DIGEST", "sha256:feed")
    client, meta = MlflowClient(commands.tracking_uri), json.loads((prepared / "meta.json").read_text())
    for _ in range(2):  # a restarted job adds nothing
        assert extend(f"models:/{NAME}/1", *STILL, "run.model_name=ictx-child") == 0
    version = client.get_model_version("ictx-child", "1")
    run = client.get_run(version.run_id)
    image = "registry/ictx-training:1@sha256:feed"
    expected = {
        "stage": "extend",
        "parent_version": f"{NAME}/1",
        "image": image,
        "data_fingerprint": meta["fingerprint"],
    }
    for tags in (run.data.tags, version.tags):
        assert {name: tags[f"ictx.{name}"] for name in expected} == expected
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == (prepared.resolve().name, meta["fingerprint"][:36])
    assert json.loads(data.dataset.source) == {"uri": str(prepared.resolve())}
    assert client.get_experiment(run.info.experiment_id).name == "extend"
    assert run.info.run_name == "run extend"
    result = json.loads((commands.folder / "parent-1" / "result.json").read_text())
    first = client.get_model_version(NAME, "1").tags
    assert (result["stage"], result["parent"], result["model_version"]) == ("pretrain", "", "1")
    assert first["ictx.stage"] == "pretrain" and "ictx.parent_version" not in first


def test_several_ranks_begin_with_the_same_weights(
    commands: Commands, parents: list[Path], prepared: Path, tmp_path: Path
) -> None:
    wanted = [f"init=models:/{NAME}/1", f"run.dir={tmp_path}", f"data.dir={prepared}", "run.model_name=", *STILL]
    arguments = ["train", "extend", "--config", commands.folder / "child.yaml", *(f"--set={value}" for value in wanted)]
    for rank in [commands.end(rank) for rank in commands.ranks(2, *arguments)]:
        assert rank.status == 0, rank.err
    for name, weight in weights(parents[0] / "export").items():
        assert torch.equal(weights(tmp_path / "export")[name], weight), name


def test_an_alias_that_moves_changes_nothing_for_a_run_that_began(
    commands: Commands, extend: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, run = MlflowClient(commands.tracking_uri), tmp_path / "run"
    client.set_registered_model_alias(NAME, "base", "1")
    assert extend(f"models:/{NAME}@base", "train.checkpoint_every=1") == 0
    first = (run / "result.json").read_text()
    client.set_registered_model_alias(NAME, "base", "2")
    # As if the run had been stopped before its first checkpoint.
    shutil.rmtree(run / "checkpoints")
    assert extend(f"models:/{NAME}@base") == 0
    assert note(run)["origin"] == f"models:/{NAME}/1"
    measures = ("final_loss", "val_loss")
    again = json.loads((run / "result.json").read_text())
    assert [again[name] for name in measures] == [json.loads(first)[name] for name in measures]
    # A later start needs only the kept model, and downloads damaged files again.
    (run / "init" / "model.safetensors").write_bytes(b"")
    shutil.rmtree(run / "checkpoints")
    assert extend(f"models:/{NAME}@base") == 0
    with pytest.raises(
        UserError, match=f"init is models:/{NAME}/2, but .*/run was started with models:/{NAME}@base: use"
    ):
        extend(f"models:/{NAME}/2")


@pytest.mark.parametrize(
    ("init", "settings", "message"),
    [
        ("''", [], "init is not set: add --set init=models:/NAME@ALIAS"),
        ("ictx-tiny", [], "init is ictx-tiny: expected models:/NAME/VERSION, models:/NAME@ALIAS or run:/FOLDER"),
        ("models:/x", [], "'models:/x' is not a model: expected"),
        (f"models:/{NAME}/7", [], f"models:/{NAME}/7 does not exist"),
        (f"models:/{NAME}@nobody", [], f"models:/{NAME}@nobody does not exist"),
        ("models:/nothing/1", [], "models:/nothing/1 does not exist"),
        ("run:/nowhere", [], "init is run:/nowhere, which is not a completed run of yours: /nowhere: No such file"),
        (f"models:/{NAME}/1", ["model.hidden_size=32"], f"model.hidden_size is 32, but models:/{NAME}/1 has 64: leave"),
        (f"models:/{NAME}/1", ["model.hidden_sise=32"], "unknown setting model.hidden_sise: did you mean model.hidden"),
        (f"models:/{NAME}/1", ["model=3"], "setting model is 3: expected keys and values"),
        (
            f"models:/{NAME}/1",
            ["data.vocab_size=600"],
            f"data.vocab_size is 600: expected model.vocab_size, {VOCABULARY}",
        ),
        (f"models:/{NAME}/1", ["train.steps=0"], "train.steps is 0: expected 1 or more"),
        (
            f"models:/{NAME}/1",
            ["train.sequence_length=512"],
            "train.sequence_length is 512, longer than the parent's context of 256 tokens",
        ),
    ],
)
def test_what_cannot_be_begun_with_is_refused_by_name(
    extend: Callable[..., int], tmp_path: Path, init: str, settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        extend(init, *settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_pretraining_has_no_parent(commands: Commands) -> None:
    with pytest.raises(UserError, match="init is models:/x/1: leave it out"):
        load(str(commands.folder / "test.yaml"), ["init=models:/x/1"])


def test_a_server_that_is_away_is_one_line(extend: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # port `discard`, without a server
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI is 'http://127\.0\.0\.1:9': connection refused"):
        extend(f"models:/{NAME}/1", "run.tracking_patience=0")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def copied(commands: Commands, parents: list[Path], tmp_path: Path) -> Path:
    """A copy of a parent's folder."""
    return Path(shutil.copytree(parents[0], tmp_path / "parent"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: damage(run / "export" / "model.safetensors"), "model.safetensors: its SHA-256 is .* instead of"),
        (lambda run: (run / "export" / "more.bin").write_text(""), "export/more.bin: is not in the manifest"),
        (lambda run: (run / "result.json").unlink(), "not a completed run of yours: .*/result.json: No such file"),
        (lambda run: shutil.rmtree(run / "export"), "not a completed run of yours: .*/export: No such file"),
        (lambda run: (run / "export").chmod(0o777), r"export: others can write to it \(mode 0777\)"),
        pytest.param(lambda run: os.chown(run, MALLORY, 0), f"belongs to user id {MALLORY}, not to 0", marks=as_root),
        pytest.param(
            lambda run: os.chown(run / "export" / "config.json", MALLORY, 0),
            f"export/config.json: belongs to user id {MALLORY}, not to 0",
            marks=as_root,
        ),
    ],
)
def test_a_run_that_is_damaged_or_somebody_elses_is_refused(
    extend: Callable[..., int], copied: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    change(copied)
    with pytest.raises(UserError, match=message):
        extend(f"run:{copied}")
    assert not (tmp_path / "run" / "init").exists()


def test_a_run_without_checksums_is_taken_as_it_is(extend: Callable[..., int], copied: Path, tmp_path: Path) -> None:
    """A run that registered nothing has no SHA256SUMS."""
    (copied / "export" / SUMS_FILE).unlink()
    assert extend(f"run:{copied}", *STILL) == 0
    # The parent changes meanwhile, but this run keeps its initial model.
    damage(copied / "export" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert extend(f"run:{copied}", *STILL) == 0
    damage(tmp_path / "run" / "init" / "model.safetensors")
    with pytest.raises(UserError, match=r"has changed since .* was started: use another"):
        extend(f"run:{copied}", *STILL)


def test_a_registered_model_that_changed_is_refused(
    commands: Commands, extend: Callable[..., int], tmp_path: Path
) -> None:
    client = MlflowClient(commands.tracking_uri)
    stored = Path(client.get_model_version_download_uri(NAME, "1").removeprefix("file://")) / "model.safetensors"
    shutil.copy(stored, tmp_path / "kept")
    try:
        damage(stored)
        with pytest.raises(
            UserError, match=f"models:/{NAME}/1: model.safetensors .* does not have the checksum in its"
        ):
            extend(f"models:/{NAME}/1")
    finally:
        shutil.copy(tmp_path / "kept", stored)


def test_data_of_another_tokenizer_is_refused(
    extend: Callable[..., int], corpus: Path, parents: list[Path], tmp_path: Path
) -> None:
    settings = DataConfig(vocab_size=VOCABULARY, min_bytes=100_000, validation_share=0.1, tokenizer_bytes=50_000)
    other = prepare([corpus], tmp_path / "data", settings)
    with pytest.raises(UserError, match=f"{other} has another tokenizer than models:/{NAME}/1: prepare it with data.t"):
        extend(f"models:/{NAME}/1", f"data.dir={other}")


def test_another_corpus_is_prepared_with_the_tokenizer_of_the_model_that_it_is_for(
    commands: Commands, extend: Callable[..., int], parents: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(400):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"Another text, number {number}. " * 40)
    run, config = tmp_path / "run", commands.folder / "child.yaml"
    settings = [f"init=models:/{NAME}/1", f"run.dir={run}", "data.min_bytes=1000"]
    done = commands.run(
        *("data", "prepare", "--config", config, "--corpus", tmp_path / "corpus", "--out", tmp_path / "data"),
        *(f"--set={value}" for value in settings),
    )
    assert done.status == 0, done.err
    made = Path(done.out.splitlines()[-1])
    assert (made / "tokenizer.json").read_bytes() == (parents[0] / "export" / "tokenizer.json").read_bytes()
    # The stage starts from the model that is now in the run's folder.
    assert extend(f"models:/{NAME}/1", f"data.dir={made}") == 0


def test_a_corpus_for_a_model_needs_the_folder_that_it_comes_to(commands: Commands, corpus: Path) -> None:
    words = ["data", "prepare", "--config", commands.folder / "child.yaml", "--corpus", corpus, "--out", "x"]
    done = commands.run(*words, f"--set=init=models:/{NAME}/1")
    assert (done.status, done.err.splitlines()[-1]) == (
        2,
        "ictx: run.dir is not set: add --set run.dir=FOLDER (the model of init is kept there)",
    )
