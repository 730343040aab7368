"""Training from the command line: runs learn, stop, resume exactly, export and register; errors are one line."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Container, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Commands
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from ictx.data.config import DataConfig
from ictx.data.prepare import prepare
from ictx.errors import UserError
from ictx.model.float16 import by_layer, tracked_amax
from ictx.model.hf import load_pretrained
from ictx.train.checkpoint import load_model
from ictx.train.config import PretrainConfig, load
from ictx.train.pretrain import main as train

STEPS, EVERY, BATCH = 120, 45, 8
"""conftest's settings: steps, steps between checkpoints, sequences per rank and step."""


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> dict[int, tuple[float, float]]:
    return {record["step"]: (record["loss"], record["learning_rate"]) for record in records(run)}


def result_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "result.json").read_text())
    return content


@pytest.fixture(scope="module")
def whole(commands: Commands, prepared: Path) -> Path:
    """An uninterrupted run, started with torchrun as in jobs."""
    run = commands.folder / "whole"
    arguments = ["--nproc-per-node=2", "--standalone", "-m", "ictx", *commands.pretrain(run, prepared)]
    ended = commands.end(commands.start(*arguments, module="torch.distributed.run"))
    assert ended.status == 0, ended.err
    assert "below the corpus's unigram entropy" in ended.out
    return run


def test_a_record_tells_what_a_step_is_made_of(whole: Path) -> None:
    for record in records(whole):
        parts = {part: record[f"{part}_seconds"] for part in ("data", "forward", "backward", "optimizer", "ranks")}
        assert min(parts.values()) > 0, record
        # The rest is a few assignments, during which a busy machine may suspend the process.
        assert sum(parts.values()) <= record["step_seconds"] <= sum(parts.values()) + 0.5, record
        assert record["tokens_per_second"] > 0


def test_a_record_tells_of_what_comes_between_steps(whole: Path) -> None:
    logged = records(whole)
    pauses = {name: [r["step"] for r in logged if r[f"{name}_seconds"] > 0] for name in ("evaluation", "checkpoint")}
    # A checkpoint is written after the record of its step, so the last one is in no record.
    assert pauses == {"evaluation": [60, 120], "checkpoint": [EVERY + 1, 2 * EVERY + 1]}


@pytest.fixture(scope="module")
def resumed(commands: Commands, prepared: Path) -> Path:
    """A resumed run, stopped in the middle by a signal to one rank."""
    run = commands.folder / "resumed"
    ranks = commands.ranks(2, *commands.pretrain(run, prepared))
    wait_for_step(run, EVERY + 3, ranks)
    ranks[1].send_signal(signal.SIGTERM)
    ended = [commands.end(rank) for rank in ranks]
    assert [rank.status for rank in ended] == [75, 75], ended
    stopped_at = max(curve(run))
    assert EVERY + 3 <= stopped_at < STEPS
    assert (run / "checkpoints" / f"step-{stopped_at:08}").is_dir()
    # As if killed a little later: records, and a partial one, of steps after the last checkpoint.
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": stopped_at + 1, "loss": 0.0, "learning_rate": 0.0}) + '\n{"step": ')
    (run / "checkpoints" / f"step-{STEPS - 1:08}.part").mkdir()
    ended = [commands.end(rank) for rank in commands.ranks(2, *commands.pretrain(run, prepared))]
    assert [rank.status for rank in ended] == [0, 0], ended
    assert f"resuming after step {stopped_at}" in ended[0].out
    assert result_of(run)["resumed_from_step"] == stopped_at
    return run


def wait_for_step(run: Path, step: int, ranks: list[subprocess.Popen[str]]) -> None:
    """Waits until a run has recorded the step."""
    while all(rank.poll() is None for rank in ranks):
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.01)
    raise AssertionError([rank.communicate() for rank in ranks])


def test_training_gets_below_the_unigram_entropy(whole: Path) -> None:
    result, losses = result_of(whole), [record["loss"] for record in records(whole)]
    assert losses[0] > math.log(512) - 0.5, "the initial loss is that of chance"
    assert result["val_loss"] < result["unigram_entropy"] - 0.1, "the model uses the context"
    assert [record["step"] for record in records(whole)] == list(range(1, STEPS + 1))
    assert result["final_loss"] == losses[-1]
    assert result["tokens"] == STEPS * BATCH * 2 * 32
    last = records(whole)[-1]
    assert not {"auxiliary_loss", "expert_max_violation"} & {*last}, "a dense model has no such metrics"


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(whole: Path, resumed: Path) -> None:
    assert list(curve(resumed)) == list(range(1, STEPS + 1)), "each step must be recorded once"
    for step, (loss, rate) in curve(whole).items():
        assert curve(resumed)[step] == (pytest.approx(loss, rel=1e-5), rate), f"step {step}"
    assert result_of(resumed)["val_loss"] == pytest.approx(result_of(whole)["val_loss"], rel=1e-5)


def test_only_the_newest_checkpoints_stay(resumed: Path) -> None:
    names = sorted(path.name for path in (resumed / "checkpoints").glob("step-????????"))
    assert names == ["step-00000090", "step-00000120"]


def test_the_export_has_the_loss_that_was_measured(whole: Path, prepared: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole / "export")
    tokens = np.fromfile(prepared / "validation-00000.bin", "<u2").astype(np.int64)
    # Validation uses 64 windows at equal distances.
    available = (len(tokens) - 1) // 32
    places = [place * (available // 64) for place in range(64)]
    windows = torch.from_numpy(np.stack([tokens[place * 32 : place * 32 + 33] for place in places]))
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert loss == pytest.approx(result_of(whole)["val_loss"], rel=1e-5)
    with torch.no_grad(), tracked_amax(ours := load_pretrained(whole / "export")) as amax:
        ours(windows[:, :-1])
    last = records(whole)[-1]
    found = {name.removeprefix("activation_amax/"): last[name] for name in last if name.startswith("activation_amax/")}
    assert set(found) == {"embed_tokens", "layers.0", "layers.1", "norm", "lm_head"}
    assert found == pytest.approx(by_layer(amax), rel=1e-5), "the maximum of both ranks"
    kept = load_model(whole / "checkpoints" / f"step-{STEPS:08}").state_dict()
    for name, weight in load_pretrained(whole / "export").state_dict().items():
        assert torch.equal(weight, kept[name]), name
    tokenizer = AutoTokenizer.from_pretrained(whole / "export")
    assert tokenizer.decode(tokenizer("def f(): return 'ü'").input_ids) == "def f(): return 'ü'"
    assert tokenizer.model_max_length == model.config.max_position_embeddings


def test_attention_ends_where_documents_end(
    commands: Commands, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the mask, the loss is that of each document alone in transformers with the exported model."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", commands.tracking_uri)
    lines = [json.dumps({"text": f"{number} is followed by {number + 1}"}) for number in range(600)]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    data = DataConfig(512, min_bytes=1, validation_share=0.2, tokenizer=prepared)
    folder = prepare([tmp_path / "short.jsonl"], tmp_path / "data", data)
    losses = {}
    for mask in (True, False):
        run = tmp_path / str(mask)
        chosen = ["train.steps=20", "run.model_name=", f"train.mask_documents={mask}", "train.validation_windows=10000"]
        wanted = [f"run.dir={run}", f"data.dir={folder}", *chosen]
        assert train(load(str(commands.folder / "test.yaml"), wanted)) == 0
        losses[mask] = result_of(run)["val_loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "True" / "export")
    tokens = np.fromfile(folder / "validation-00000.bin", "<u2").astype(np.int64)
    total = count = 0.0
    for start in range(0, len(tokens) - 32, 32):
        inputs, labels = tokens[start : start + 32], tokens[start + 1 : start + 33]
        ends = [*(np.flatnonzero(inputs == 0) + 1), 32]
        for first, last in zip([0, *ends], ends, strict=False):
            if first < last:
                with torch.no_grad():
                    logits = model(torch.from_numpy(inputs[None, first:last])).logits[0]
                total += cross_entropy(logits, torch.from_numpy(labels[first:last]), reduction="sum").item()
                count += last - first
    assert losses[True] == pytest.approx(total / count, rel=1e-5)
    assert abs(losses[False] / losses[True] - 1) > 1e-3


EXPERTS = """
model: {vocab_size: 512, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 1,
        q_lora_rank: 32, max_position_embeddings: 256, initializer_range: 0.1, num_nextn_predict_layers: 1,
        moe: {n_routed_experts: 8, num_experts_per_tok: 2, moe_intermediate_size: 32, n_group: 4, topk_group: 2}}
train: {steps: 5, sequence_length: 32, batch_size: 4, dtype: float32, log_every: 1, validate_every: 5,
        validation_windows: 16, checkpoint_every: 3}
optimizer: {learning_rate: 3.0e-3, warmup_steps: 1}
run: {model_name: ""}
"""


def test_experts_and_the_further_prediction_train_on_several_ranks(
    commands: Commands, prepared: Path, tmp_path: Path
) -> None:
    """Two ranks give the losses of one rank with twice the batch size, also after a restart in the middle."""
    settings = tmp_path / "experts.yaml"
    settings.write_text(EXPERTS)
    runs = {name: tmp_path / name for name in ("one", "two", "restarted", "accumulated")}

    def ended(name: str, count: int, *further: str) -> None:
        wanted = [f"run.dir={runs[name]}", f"data.dir={prepared}", *further]
        arguments = ["train", "pretrain", "--config", settings, *(f"--set={value}" for value in wanted)]
        for rank in [commands.end(rank) for rank in commands.ranks(count, *arguments)]:
            assert rank.status == 0, rank.err

    ended("one", 1, "train.batch_size=8")
    ended("accumulated", 1, "train.batch_size=2", "train.accumulate=4")
    ended("two", 2)
    shutil.copytree(runs["two"], runs["restarted"])
    shutil.rmtree(runs["restarted"] / "checkpoints" / "step-00000005")
    ended("restarted", 2)
    models = {name: load_pretrained(run / "export") for name, run in runs.items()}
    for name in ("one", "restarted", "accumulated"):
        for step, (loss, _) in curve(runs["two"]).items():
            assert curve(runs[name])[step][0] == pytest.approx(loss, rel=1e-5), f"{name}, step {step}"
        biases, others = ([router.e_score_correction_bias for router in models[key].routers] for key in ("two", name))
        for bias, other in zip(biases, others, strict=True):
            assert bias.abs().max() == pytest.approx(0.005), "each step changes the bias"
            # Two scores that are almost equal may be rounded into the other order.
            assert (bias - other).abs().lt(1e-6).float().mean() >= 0.85, name
    last = records(runs["two"])[-1]
    assert last["expert_max_violation"] > 0
    assert last["auxiliary_loss"] > 0.3, "mainly of the further prediction"
    for name in ("one", "accumulated"):
        assert records(runs[name])[-1]["auxiliary_loss"] == pytest.approx(last["auxiliary_loss"], rel=1e-5)
    assert last["activation_amax/layers.1"] > 0
    assert "mtp" not in (runs["two"] / "export" / "model.safetensors").read_bytes()[:20000].decode(errors="replace")


def test_the_registry_has_the_model_its_alias_and_where_it_came_from(
    commands: Commands, resumed: Path, tmp_path: Path
) -> None:
    client, result = MlflowClient(commands.tracking_uri), result_of(resumed)
    version = client.get_model_version_by_alias("ictx-test", "candidate")
    assert (str(version.version), version.run_id) == (result["model_version"], result["mlflow_run_id"])
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["ictx.image_digest"] == result["image_digest"] == "sha256:feed"
    assert run.data.tags["slurm.job_id"] == "4711"
    assert run.data.params["train.sequence_length"] == "32"
    logged = client.get_metric_history(version.run_id, "loss")
    assert [metric.step for metric in logged] == list(range(1, STEPS + 1)), "one MLflow run with each step once"
    source = client.get_model_version_download_uri("ictx-test", version.version)
    copy = Path(download_artifacts(source, dst_path=str(tmp_path), tracking_uri=commands.tracking_uri))
    for file in (resumed / "export").iterdir():
        assert (copy / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_job_that_starts_again_after_its_end_changes_nothing(
    commands: Commands, resumed: Path, prepared: Path
) -> None:
    client, before = MlflowClient(commands.tracking_uri), result_of(resumed)
    (resumed / "result.json").unlink()
    ended = commands.run(*commands.pretrain(resumed, prepared))
    assert ended.status == 0, ended.err
    after = result_of(resumed)
    for key in ("final_loss", "val_loss", "model_version", "mlflow_run_id", "steps", "checkpoint"):
        assert after[key] == before[key], key
    run_id = before["mlflow_run_id"]
    assert len(client.search_model_versions(f"name = 'ictx-test' and run_id = '{run_id}'")) == 1
    assert len(client.get_metric_history(run_id, "loss")) == STEPS


def test_a_store_that_is_away_for_a_while_loses_no_metric(commands: Commands, prepared: Path, tmp_path: Path) -> None:
    settings = ["train.checkpoint_every=5", "train.validation_windows=8", "run.model_name="]
    process = commands.start(*commands.pretrain(tmp_path, prepared, *settings))
    sent = tmp_path / "mlflow_sent_step"
    while not sent.exists() and process.poll() is None:
        time.sleep(0.01)
    said = []
    assert process.stdout
    # Another program locks the database for longer than SQLite waits.
    with closing(sqlite3.connect(commands.tracking_uri.removeprefix("sqlite:///"), timeout=60)) as store:
        store.execute("BEGIN EXCLUSIVE")
        for line in process.stdout:
            said.append(line)
            if "MLflow does not answer" in line:
                break
        missing_from = int(sent.read_text())
    ended = commands.end(process)
    assert ended.status == 0, "".join(said) + ended.out + ended.err
    assert "MLflow answers again" in ended.out
    client = MlflowClient(commands.tracking_uri)
    run = client.get_run(result_of(tmp_path)["mlflow_run_id"])
    logged = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in logged] == [(r["step"], r["loss"]) for r in records(tmp_path)]
    assert 0 < missing_from < STEPS == len(logged)
    assert run.info.status == "FINISHED"


def test_what_a_run_could_not_send_its_next_start_sends_once(
    commands: Commands, resumed: Path, prepared: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(resumed, tmp_path / "run")
    client, run_id = MlflowClient(commands.tracking_uri), result_of(run)["mlflow_run_id"]
    before = [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, "loss")]
    # As if the server had received the last records, but the job was killed before the response.
    (run / "mlflow_sent_step").write_text("100\n")
    ended = commands.run(*commands.pretrain(run, prepared))
    assert ended.status == 0, ended.err
    assert [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, "loss")] == before
    assert (run / "mlflow_sent_step").read_text() == f"{STEPS}\n"


def test_the_settings_file_is_refused_by_name_before_anything_starts(
    commands: Commands, prepared: Path, tmp_path: Path
) -> None:
    for setting, message in {
        "train.dtype=float64": "train.dtype is 'float64': expected one of float32, bfloat16",
        "train.sequence_length=512": "train.sequence_length is 512: expected at most model.max_position_emb",
        "optimizer.learning_rate=-1": "optimizer.learning_rate is -1.0: expected more than 0",
        "optimizer.lr=1": "unknown setting optimizer.lr",
        "data.vocab_size=600": "data.vocab_size is 600: expected model.vocab_size, 512",
    }.items():
        with pytest.raises(UserError) as error:
            load(str(commands.folder / "test.yaml"), [setting])
        assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.dir=/nowhere"], "/nowhere holds no prepared data"),
        (["train.batch_size=100000"], "a global batch takes 100000"),
        (["model.vocab_size=600"], "was prepared with vocab_size 512, but model.vocab_size is 600"),
        (["model.hidden_size=32"], "step-00000120 does not match this configuration"),
        (["train.steps=100"], "train.steps is 100, but .* has a checkpoint of step 120"),
        (["data.dir={other}"], "was trained on other data than .*/other:"),
        (
            ["optimizer.learning_rate=1e30", "run.dir={new}"],
            r"the loss is .* at step 12 \(gradient norm nan\), after 10 .*: lower optimizer.learn",
        ),
        (["run.dir={new}"], "MLFLOW_TRACKING_URI is 'nonsense://store'"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    commands: Commands,
    whole: Path,
    prepared: Path,
    tmp_path: Path,
    settings: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://store" if "MLFLOW" in message else commands.tracking_uri)
    shutil.copytree(prepared.resolve(), tmp_path / "other")
    meta = json.loads((tmp_path / "other" / "meta.json").read_text())
    (tmp_path / "other" / "meta.json").write_text(json.dumps(meta | {"fingerprint": "another"}))
    chosen = [value.format(new=tmp_path / "new", other=tmp_path / "other") for value in settings]
    before = sorted(whole.rglob("*"))
    config = load(str(commands.folder / "test.yaml"), [f"run.dir={whole}", f"data.dir={prepared}", *chosen])
    with pytest.raises(UserError, match=message):
        train(config)
    assert sorted(whole.rglob("*")) == before


def test_a_full_disk_leaves_the_last_good_checkpoint(commands: Commands, prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = commands.pretrain(run, prepared, "train.steps=15", "train.checkpoint_every=15", "run.model_name=")
    store = f"sqlite:///{tmp_path}/mlflow.db"  # a new store, since the tests' shared one may exceed the limit
    limit = ("prlimit", "--fsize=4000000")
    ended = commands.end(commands.start(*arguments, prefix=limit, env={"MLFLOW_TRACKING_URI": store}))
    assert ended.status == 2, ended
    assert f"ictx: cannot write checkpoint {run}/checkpoints/step-00000015: " in ended.err
    assert "Traceback" not in ended.err
    assert not list((run / "checkpoints").iterdir())


def make_nan(monkeypatch: pytest.MonkeyPatch, steps: Container[int]) -> None:
    """Sets one value of one gradient to NaN in these steps, counted from the start of the process."""
    clip, count = torch.nn.utils.clip_grad_norm_, itertools.count(1)

    def poisoned(parameters: Iterable[torch.nn.Parameter], longest: float) -> Any:
        weights = list(parameters)
        if next(count) in steps:
            assert weights[3].grad is not None
            weights[3].grad.to_local()[0] = math.nan  # type: ignore[attr-defined]
        return clip(weights, longest)

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", poisoned)


SHORT = ["train.steps=6", "train.checkpoint_every=3", "train.keep_checkpoints=1", "run.model_name=", "run.dir={}"]


def short(commands: Commands, prepared: Path, run: Path, *further: str) -> PretrainConfig:
    wanted = [setting.format(run) for setting in SHORT]
    return load(str(commands.folder / "test.yaml"), [*wanted, f"data.dir={prepared}", *further])


def strict(text: str) -> Any:
    """Parses JSON; fails on NaN, which Python writes by default but is not JSON."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_gradient_that_is_not_finite_changes_nothing(
    commands: Commands, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the step of a checkpoint, and at the last step, whose state is exported."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", commands.tracking_uri)
    make_nan(monkeypatch, {3, 6})
    assert train(short(commands, prepared, tmp_path)) == 0
    logged = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["skipped_steps"] for record in logged] == [0, 0, 1, 0, 0, 1]
    assert ["gradient_norm" in record for record in logged] == [True, True, False, True, True, False]
    assert strict((tmp_path / "result.json").read_text())["val_loss"] > 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]
    for name, weight in load_pretrained(tmp_path / "export").state_dict().items():
        assert weight.isfinite().all(), name


def test_a_series_of_bad_steps_ends_the_run_and_leaves_the_last_good_checkpoint(
    commands: Commands, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", commands.tracking_uri)
    wanted = ["train.steps=20", "train.bad_steps=4", "train.roll_backs=0"]
    with monkeypatch.context() as patch:
        make_nan(patch, range(5, 100))
        with pytest.raises(UserError, match=r"at step 9 .*after 4 skipped steps .* checkpoint is of step 3: lower"):
            train(short(commands, prepared, tmp_path, *wanted))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert train(short(commands, prepared, tmp_path, *wanted)) == 0
    assert result_of(tmp_path)["resumed_from_step"] == 3


def test_weights_that_explode_at_the_last_step_are_not_published(
    commands: Commands, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", commands.tracking_uri)
    rate = ["optimizer.warmup_steps=0", "optimizer.learning_rate=1e9", "optimizer.final_share=0.9"]
    wanted = ["train.steps=2", *rate, "run.model_name=ictx-exploded"]
    try:
        train(short(commands, prepared, tmp_path, *wanted))
    except UserError as error:
        assert "lower optimizer.learning_rate" in str(error)
        assert not (tmp_path / "export").exists()
        assert not MlflowClient(commands.tracking_uri).search_model_versions("name = 'ictx-exploded'")
    else:
        for name, weight in load_pretrained(tmp_path / "export").state_dict().items():
            assert weight.isfinite().all(), name
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        strict(line)
