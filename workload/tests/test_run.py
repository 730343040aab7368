"""The training loop: normalisation of steps, bad steps, and errors that do not stop a run."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Commands
from test_pretrain import curve, make_nan, records, result_of

from ictx.data.loader import Batch, Batches
from ictx.data.shards import TokenArray
from ictx.errors import UserError
from ictx.model import Transformer
from ictx.model.hf import load_pretrained
from ictx.track.records import MetricsFile
from ictx.train import checkpoint, run
from ictx.train.config import OptimizerConfig, PretrainConfig, load
from ictx.train.loss import Counts, Loss
from ictx.train.optimizer import learning_rate, new_optimizers
from ictx.train.pretrain import Pretraining
from ictx.train.pretrain import main as train
from ictx.train.progress import LEAST, RECENT, Progress
from ictx.train.ranks import Ranks
from ictx.train.validation import Validation


@pytest.fixture(autouse=True)
def tracked(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process log to the store of the commands."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", commands.tracking_uri)


def short(commands: Commands, prepared: Path, folder: Path, *further: str) -> PretrainConfig:
    """Returns the settings of a run of six steps with a checkpoint after three."""
    wanted = ["train.steps=6", "train.checkpoint_every=3", "train.validation_windows=4", "run.model_name="]
    return load(str(commands.folder / "test.yaml"), [*wanted, f"run.dir={folder}", f"data.dir={prepared}", *further])


class Masked(Pretraining):
    """Pretraining with masked labels, whose number differs between windows."""

    def batches(self, ranks: Ranks) -> Any:
        source = super().batches(ranks)
        following = source.next

        def next() -> Batch:
            batch = following()
            number = batch.input_ids[:, :1]
            kept = torch.arange(batch.labels.shape[1]) % (2 + number % 7) == 0
            batch.labels[~kept] = -1
            return batch

        source.next = next  # type: ignore[method-assign]
        return source


def test_accumulated_batches_are_one_larger_batch(commands: Commands, prepared: Path, tmp_path: Path) -> None:
    """Also if they differ in their numbers of labels and further labels, where a mean of means would be wrong."""
    shapes = {"whole": (8, 1, False), "accumulated": (2, 4, False), "reduced once": (2, 4, True)}
    for name, (batch, times, once) in shapes.items():
        wanted = [f"train.batch_size={batch}", f"train.accumulate={times}", f"train.reduce_once={once}"]
        wanted += ["optimizer.learning_rate=1e-3", "model.num_nextn_predict_layers=1", "train.z_loss=1e-3"]
        config = short(commands, prepared, tmp_path / name, *wanted)
        assert run.main(Masked(config), config) == 0
    whole = curve(tmp_path / "whole")
    assert len({round(loss, 3) for loss, _ in whole.values()}) > 3, "the loss changes"
    for name in ("accumulated", "reduced once"):
        for step, (loss, _) in curve(tmp_path / name).items():
            assert loss == pytest.approx(whole[step][0], rel=1e-5), f"{name}, step {step}"
        for record, wanted in zip(records(tmp_path / name), records(tmp_path / "whole"), strict=True):
            assert record["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-3)
            for added in ("mtp_loss", "z_loss"):
                assert record[added] == pytest.approx(wanted[added], rel=1e-5), added
            assert record["auxiliary_loss"] == pytest.approx(record["mtp_loss"] + record["z_loss"])
        assert result_of(tmp_path / name)["tokens"] == result_of(tmp_path / "whole")["tokens"] == 6 * 8 * 32


def test_the_run_goes_back_after_a_series_of_bad_steps_and_leaves_their_data_out(
    commands: Commands,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    taken: list[int] = []
    following = Batches.next

    def next(self: Batches) -> Batch:
        taken.append(self.taken)
        return following(self)

    monkeypatch.setattr(Batches, "next", next)
    make_nan(monkeypatch, range(5, 8))
    assert train(short(commands, prepared, tmp_path, "train.bad_steps=2", "train.steps=8")) == 0
    assert (
        "rolled back to the checkpoint of step 3, skipping the data since then (roll-back 1 of 3"
        in capsys.readouterr().out
    )
    # Steps 1 to 4, three bad steps, and steps 4 to 8 with other data.
    assert taken == [8 * number for number in range(12)]
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 9))
    assert [record["roll_backs"] for record in records(tmp_path)] == [0, 0, 0, 1, 1, 1, 1, 1]
    result = result_of(tmp_path)
    assert (result["roll_backs"], result["skipped_steps"], result["tokens"]) == (1, 3, 8 * 8 * 32)


def test_a_run_that_goes_bad_again_and_again_ends(
    commands: Commands, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_nan(monkeypatch, range(5, 1000))
    config = short(commands, prepared, tmp_path, "train.bad_steps=1", "train.roll_backs=2", "train.checkpoint_every=2")
    with pytest.raises(UserError, match=r"at step 6 .*, after 1 skipped steps .* checkpoint is of step 4: lower"):
        train(config)
    assert max(curve(tmp_path)) <= 6


def test_a_spike_is_far_above_the_last_steps() -> None:
    progress = Progress()
    for number in range(RECENT + 9):
        assert not progress.is_spike(1e9, 1e9, 6.0) or number >= LEAST
        progress.note(3 + 0.1 * (number % 2), 1.0 + 0.1 * (number % 3))
    assert len(progress.recent) == RECENT
    for loss, norm, spike in ((3.1, 1.1, False), (2.0, 0.1, False), (9.0, 1.0, True), (3.0, 5.0, True)):
        assert progress.is_spike(loss, norm, 6.0) is spike
        assert not progress.is_spike(loss, norm, 0.0), "0 disables it"
    again = Progress()
    again.load(progress.dump())
    again.load('{"of_a_later_version": 1}')
    assert again.is_spike(9.0, 1.0, 6.0)
    assert again.dump() == progress.dump()


def test_a_spike_changes_no_weight(
    commands: Commands, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ictx.train.progress.LEAST", 3)
    clip, count = torch.nn.utils.clip_grad_norm_, iter(range(1, 100))

    def spiked(parameters: Any, longest: float) -> Any:
        return clip(parameters, longest) * (100 if next(count) == 5 else 1)

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", spiked)
    assert train(short(commands, prepared, tmp_path, "train.skip_spikes=20")) == 0
    assert [record["skipped_steps"] for record in records(tmp_path)] == [0, 0, 0, 0, 1, 0]


class OneOf:
    """A rank without a process group, whose sums are its own values."""

    def __init__(self, rank: int, count: int) -> None:
        self.data_rank, self.data_count, self.part = rank, count, (0, 1)
        self.device, self.summed = torch.device("cpu"), [0.0, 0.0]

    def total(self, *values: float) -> list[float]:
        self.summed = list(values)
        return [1.0, 1.0]

    def largest(self, *values: float) -> list[float]:
        return list(values)

    def say(self, text: str) -> None: ...


class Sums:
    """A stage whose loss is the mean of the batch's inputs."""

    def __init__(self, kept: list[Batch]) -> None:
        self.kept = kept

    def counts(self, model: Transformer, batch: Batch) -> Counts:
        return {"tokens": (batch.labels >= 0).sum()}

    def loss(self, model: Transformer, batch: Batch, totals: Counts) -> Loss:
        self.kept.append(batch)
        mean = batch.input_ids[(batch.labels >= 0)].sum() / totals["tokens"].clamp(min=1).double()
        return mean, {"loss": mean}


@pytest.mark.parametrize("windows", [1, 5, 64, 10**9])
def test_validation_has_the_same_windows_at_any_number_of_ranks(
    commands: Commands, prepared: Path, tmp_path: Path, windows: int
) -> None:
    config = short(commands, prepared, tmp_path, f"train.validation_windows={windows}")
    data, seen = TokenArray.open(prepared, "validation"), set[tuple[int, frozenset[bytes]]]()

    def read(numbers: Sequence[int]) -> Batch:
        return Batch.of([data.window(number, 32) for number in numbers])

    for count in (1, 2, 3, 8):
        batches: list[Batch] = []

        totals = [0.0, 0.0]
        for rank in range(count):
            ranks: Any = OneOf(rank, count)
            Validation(data.windows(32), read, config.train, ranks).examine(Transformer(config.model), Sums(batches))
            totals = [total + own for total, own in zip(totals, ranks.summed, strict=True)]
        rows = [row.numpy().tobytes() for batch in batches for row in batch.input_ids[batch.labels[:, 0] >= 0]]
        assert len(rows) == min(windows, data.windows(32)) == totals[1] / 32
        seen.add((round(totals[0]), frozenset(rows)))
    assert len(seen) == 1


def test_settings_of_the_optimizer_apply_to_a_run_that_goes_on(
    commands: Commands, prepared: Path, tmp_path: Path
) -> None:
    assert train(short(commands, prepared, tmp_path, "train.steps=3")) == 0
    before = load_pretrained(tmp_path / "export").state_dict()
    wanted = ["train.steps=4", "optimizer.weight_decay=50", "optimizer.beta1=0.1", "optimizer.beta2=0.2"]
    assert train(short(commands, prepared, tmp_path, *wanted)) == 0
    after = load_pretrained(tmp_path / "export").state_dict()
    name = "model.layers.0.self_attn.o_proj.weight"
    # Step 4 has the highest rate, 1e-2: each weight decays by half, and its update is at most 0.01.
    assert (after[name].norm() / before[name].norm()).item() < 0.6


@pytest.mark.parametrize(
    ("setting", "begun"),
    [("rope_theta=100", "10000.0"), ("rms_norm_eps=1e-3", "1e-06"), ("max_position_embeddings=512", "256")],
)
def test_a_model_that_would_become_another_function_is_refused_by_name(
    commands: Commands, prepared: Path, tmp_path: Path, setting: str, begun: str
) -> None:
    assert train(short(commands, prepared, tmp_path, "train.steps=1")) == 0
    kept = (tmp_path / "model.yaml").read_text()
    name = setting.split("=")[0]
    with pytest.raises(UserError, match=rf"model.{name} is .*was started with {begun}: use --set model.{name}={begun}"):
        train(short(commands, prepared, tmp_path, f"model.{setting}"))
    assert (tmp_path / "model.yaml").read_text() == kept
    assert train(short(commands, prepared, tmp_path, "train.steps=2", "model.initializer_range=0.3")) == 0


@pytest.mark.parametrize(("begun", "now"), [("10000.0", "500000.0"), ("500000.0", "10000.0")])
def test_a_run_goes_on_with_the_rotations_that_it_began_with(
    commands: Commands, prepared: Path, tmp_path: Path, begun: str, now: str
) -> None:
    """A shipped configuration's `rope_theta` may change between two starts of a run; the message has the remedy."""
    assert train(short(commands, prepared, tmp_path / "whole", f"model.rope_theta={begun}")) == 0
    assert train(short(commands, prepared, tmp_path / "run", f"model.rope_theta={begun}", "train.steps=3")) == 0
    changed = commands.folder / "changed.yaml"
    settings = yaml.safe_load((commands.folder / "test.yaml").read_text())
    changed.write_text(yaml.safe_dump(settings | {"model": settings["model"] | {"rope_theta": float(now)}}))
    given = [one.removeprefix("--set=") for one in map(str, commands.pretrain(tmp_path / "run", prepared)[4:])]
    given += ["train.steps=6", "train.checkpoint_every=3", "train.validation_windows=4", "run.model_name="]
    with pytest.raises(UserError) as refused:
        train(load(str(changed), given))
    remedy = re.search(r"--set (model\.rope_theta=\S+),", str(refused.value))
    assert f"model.rope_theta is {now}" in str(refused.value)
    assert remedy
    assert train(load(str(changed), [*given, remedy[1]])) == 0
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert yaml.safe_load((tmp_path / "run" / "model.yaml").read_text())["rope_theta"] == float(begun)


def test_rates_of_both_schedules() -> None:
    cosine, stable = OptimizerConfig(warmup_steps=10), OptimizerConfig(warmup_steps=10, schedule="wsd", decay_steps=20)
    for config in (cosine, stable):
        rates = [learning_rate(step, 100, config) / config.learning_rate for step in range(1, 101)]
        assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
        assert rates[-1] == pytest.approx(config.final_share)
        assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[9:80] == [1.0] * 71, "constant until the decay"
    assert rates[84] == pytest.approx(0.1 + 0.9 * 0.5), "1 - √(5/20)"
    for wrong in ({"schedule": "linear"}, {"decay_steps": 5}, {"schedule": "wsd", "decay_steps": 0}):
        with pytest.raises(ValueError, match=f"^{[*wrong][-1]} is"):
            OptimizerConfig(**wrong)  # type: ignore[arg-type]


def test_muon_goes_on_exactly_and_learns(commands: Commands, prepared: Path, tmp_path: Path) -> None:
    muon = ["optimizer.name=muon", "train.steps=9", "train.keep_checkpoints=9"]
    assert train(short(commands, prepared, tmp_path / "muon", *muon)) == 0
    whole = curve(tmp_path / "muon")
    assert whole[9][0] < whole[1][0] - 0.5
    model = Transformer(short(commands, prepared, tmp_path).model)
    first, second = new_optimizers(model, OptimizerConfig(name="muon"), torch.device("cpu"))
    held = [weight for optimizer in (first, second) for group in optimizer.param_groups for weight in group["params"]]
    assert {*held} == {*model.parameters()}
    assert len(held) == len([*model.parameters()])
    assert not {*first.param_groups[0]["params"]} & {model.lm_head.weight, model.model.embed_tokens.weight}
    for left in (9, 6):
        shutil.rmtree(tmp_path / "muon" / "checkpoints" / f"step-{left:08}")
    assert train(short(commands, prepared, tmp_path / "muon", *muon)) == 0
    assert result_of(tmp_path / "muon")["resumed_from_step"] == 3
    assert curve(tmp_path / "muon") == whole
    with pytest.raises(UserError, match=r"does not match this configuration"):
        train(short(commands, prepared, tmp_path / "muon", "train.steps=9"))


def test_a_run_begins_from_a_checkpoint_of_another(commands: Commands, prepared: Path, tmp_path: Path) -> None:
    """A decay from the stable part of another run equals that of a shorter run."""
    stable = [
        "optimizer.schedule=wsd",
        "optimizer.decay_steps=2",
        "optimizer.warmup_steps=1",
        "train.keep_checkpoints=9",
    ]
    assert train(short(commands, prepared, tmp_path / "long", *stable, "train.steps=9")) == 0
    assert train(short(commands, prepared, tmp_path / "whole", *stable, "train.steps=5")) == 0
    start = f"run.start_from={tmp_path}/long/checkpoints/step-00000003"
    assert train(short(commands, prepared, tmp_path / "branch", *stable, "train.steps=5", start)) == 0
    whole = curve(tmp_path / "whole")
    assert curve(tmp_path / "branch") == {step: whole[step] for step in (4, 5)}
    assert curve(tmp_path / "long")[5] != whole[5]
    for wrong, why in (("x", "is not a checkpoint"), ("checkpoints/step-00000007", "step-00000007: No such file")):
        with pytest.raises(UserError, match=why):
            train(short(commands, prepared, tmp_path / wrong, f"run.start_from={tmp_path}/long/{wrong}"))


def test_tokens_are_counted_as_they_were(commands: Commands, prepared: Path, tmp_path: Path) -> None:
    assert train(short(commands, prepared, tmp_path, "train.steps=3", "train.batch_size=4")) == 0
    assert train(short(commands, prepared, tmp_path, "train.batch_size=16")) == 0
    assert result_of(tmp_path)["tokens"] == 32 * (3 * 4 + 3 * 16)


def test_one_run_at_a_time_in_a_folder(commands: Commands, prepared: Path, tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as other:
        other.write("process 7 on n9")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"run.dir {tmp_path} is in use by process 7 on n9: wait"):
            train(short(commands, prepared, tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    assert train(short(commands, prepared, tmp_path, "train.steps=1")) == 0


@pytest.mark.parametrize("name", ["a/b", "a:b", "a@b", "a?b", "o'brien", 'a"b', " a", "a ", "a\nb", "x" * 300])
def test_names_that_no_registry_takes_are_refused_before_the_training(commands: Commands, name: str) -> None:
    with pytest.raises(UserError, match=r"^run.model_name is .*: expected letters"):
        load(str(commands.folder / "test.yaml"), [f"run.model_name={json.dumps(name)}"])


@pytest.mark.parametrize("alias", ["v1", "V12", "latest", "Latest", "a b", "a/b", ""])
def test_aliases_that_no_registry_takes_are_refused_before_the_training(commands: Commands, alias: str) -> None:
    with pytest.raises(UserError, match=r"^run.alias is .*: expected letters"):
        load(str(commands.folder / "test.yaml"), [f"run.alias={json.dumps(alias)}"])
    for good in ("champion", "v1b", "latest-1", "x_2"):
        assert load(str(commands.folder / "test.yaml"), [f"run.alias={good}"]).run.alias == good


def test_a_model_is_chosen_by_name_on_the_command_line_as_in_the_file(commands: Commands) -> None:
    for name in ("tiny-moe", "ictx-1b-128k"):
        chosen = load("pretrain/tiny.yaml", ["model.rope_theta=77", f"model={name}"])
        assert (chosen.run.model_name, chosen.model.rope_theta) == (f"ictx-{name}", 77)
        assert (chosen.model.moe is not None, chosen.data.vocab_size) == ("moe" in name, chosen.model.vocab_size)
    with pytest.raises(UserError, match=r"model/nothing.yaml does not exist"):
        load("pretrain/tiny.yaml", ["model=nothing"])


FULL = """
import resource, sys
from pathlib import Path
from ictx.track.records import MetricsFile

path = Path(sys.argv[1])
metrics = MetricsFile(path, 0)
metrics.append({"step": 1})
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
for step in (2, 3):
    metrics.append({"step": step})
assert path.read_text() == '{"step": 1}\\n', "no part of a line"
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
metrics.append({"step": 4})
assert [record["step"] for record in metrics.after(0)] == [1, 2, 3, 4]
"""


@pytest.mark.parametrize(("resumed_from", "kept"), [(0, []), (5, [0, 5])])
def test_a_step_is_recorded_once_also_step_0_of_a_run_without_a_checkpoint(
    tmp_path: Path, resumed_from: int, kept: list[int]
) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (0, 5, 10):
        first.append({"step": step})
    assert [record["step"] for record in MetricsFile(path, resumed_from).after(-1)] == kept


def test_a_full_disk_costs_no_record(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", FULL, tmp_path / "metrics.jsonl"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert re.fullmatch(f"cannot write {tmp_path}/metrics.jsonl: .*: records wait\n", ended.stdout), "once"


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_run(
    commands: Commands,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish, count = checkpoint._publish, iter(range(1, 100))

    def full(draft: Path, *rest: Any) -> None:
        if next(count) == 2:
            raise OSError(28, "No space left on device")
        publish(draft, *rest)

    monkeypatch.setattr(checkpoint, "_publish", full)
    assert train(short(commands, prepared, tmp_path, "train.checkpoint_every=2", "train.keep_checkpoints=1")) == 0
    out = capsys.readouterr().out
    assert (
        "step-00000004: [Errno 28] No space left on device: training continues, the last checkpoint is of step 2" in out
    )
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]


def test_training_goes_on_while_a_checkpoint_is_written(
    commands: Commands, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint has the state of its step, and the previous one is kept until it is complete."""
    write, publish, steps, again = checkpoint.save, checkpoint._publish, threading.Event(), tmp_path / "again"

    def slow(state: Any, storage_writer: Any, **how: Any) -> Any:
        if storage_writer.path.name == "step-00000004.part":
            assert [path.name for path in storage_writer.path.parent.glob("step-????????")] == ["step-00000002"]
            assert steps.wait(600)
        return write(state, storage_writer=storage_writer, **how)

    def kept(draft: Path, final: Path, *rest: Any) -> None:
        publish(draft, final, *rest)
        if final.name == "step-00000004":
            shutil.copytree(final, again / "checkpoints" / final.name)

    class Journal(run.Journal):
        def record(self, record: Any) -> None:
            super().record(record)
            if record["step"] == 5:
                steps.set()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", slow)
        patch.setattr(checkpoint, "_publish", kept)
        patch.setattr(run, "Journal", Journal)
        wanted = ["train.checkpoint_every=2", "train.keep_checkpoints=1"]
        assert train(short(commands, prepared, tmp_path / "whole", *wanted)) == 0
    assert steps.is_set()
    assert train(short(commands, prepared, again)) == 0
    whole, resumed = curve(tmp_path / "whole"), curve(again)
    assert result_of(again)["resumed_from_step"] == 4
    assert {step: resumed[step] for step in (5, 6)} == {step: whole[step] for step in (5, 6)}


def test_steps_are_traced(commands: Commands, prepared: Path, tmp_path: Path) -> None:
    assert train(short(commands, prepared, tmp_path, "train.profile=1")) == 0
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank-00000.json.gz"]
