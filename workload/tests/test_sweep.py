"""Sweeps from the command line: values from Optuna, pruned trials, killed workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import Commands
from mlflow import MlflowClient
from optuna.trial import TrialState
from test_wandb import environment
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb_server import WandbServer

from ictx.cli import parser, with_agents_settings
from ictx.errors import UserError
from ictx.sweep.config import SweepConfig, load
from ictx.sweep.study import STOPPED_FILE, Sweep
from ictx.sweep.worker import training
from ictx.track.records import read_records

CONFIGS = Path(__file__).parents[1] / "configs" / "sweep"


def config(folder: Path, *assignments: str) -> SweepConfig:
    return load(str(CONFIGS / "tiny.yaml"), [f"dir={folder}", *assignments], [])


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("space={}", "space is empty"),
        ("space={optimizer.learning_rate: 3}", r"space\.optimizer\.learning_rate is 3: expected keys and values"),
        ("space={train.seed: {low: 3, high: 3}}", r"space\.train\.seed\.low is 3, high is 3: expected low < high"),
        ("space={train.seed: {low: 0, high: 3, log: true}}", "expected more than 0 with log: true"),
        ("space={train.seed: {low: 0, choices: [1]}}", "choices is set: leave low, high and step out"),
        ("space={run.dir: {choices: [a]}}", "run.dir is set by the sweep"),
        ("settings=[run.model_name=x]", "run.model_name=x is set by the sweep"),
        ("pruner=best", "pruner is 'best': expected one of median, none"),
        ("trials=0", "trials is 0: expected 1 or more"),
        ("dir=", "dir is not set: add --set dir=FOLDER"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, assignment: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(tmp_path, assignment)


def test_workers_get_different_values_and_never_the_same_trial(tmp_path: Path) -> None:
    claims = []
    for _ in range(3):
        # As in three processes: each opens the sweep again.
        found = Sweep(config(tmp_path, "trials=3")).claim()
        assert found
        claims.append(found)
    assert [claim.trial.number for claim in claims] == [0, 1, 2]
    rates = {claim.trial.params["optimizer.learning_rate"] for claim in claims}
    assert len(rates) == 3 and all(1e-4 <= rate <= 3e-2 for rate in rates)
    assert all(type(claim.trial.params["optimizer.warmup_steps"]) is int for claim in claims)
    sweep = Sweep(config(tmp_path, "trials=3"))
    assert sweep.claim() is None and not sweep.finished()
    # The same seed gives the same values.
    again = Sweep(config(tmp_path / "again", "trials=3")).claim()
    assert again and again.trial.params == claims[0].trial.params


def test_a_trial_whose_worker_is_lost_is_taken_over_some_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, "trials=1", "retries=1")
    first = Sweep(settings).claim()
    assert first and Sweep(settings).claim() is None
    # While the training of a lost worker still runs, its trial is not free.
    training = subprocess.Popen(["sleep", "60"], pass_fds=[first.lock])
    first.release()
    assert Sweep(settings).claim() is None
    training.kill()
    training.wait()
    second = Sweep(settings).claim()
    assert second and second.trial.number == 0 and second.trial.params == first.trial.params
    # A worker that was signalled to stop is not counted as a failure of the trial.
    (second.folder / STOPPED_FILE).touch()
    second.release()
    third = Sweep(settings).claim()
    assert third and third.trial.user_attrs["crashes"] == 1 and not (third.folder / STOPPED_FILE).exists()
    third.release()
    assert Sweep(settings).claim() is None
    sweep = Sweep(settings)
    assert [trial.state for trial in sweep.trials()] == [TrialState.FAIL] and sweep.finished() and not sweep.best()
    assert capsys.readouterr().out.count("its worker was lost") == 2


def test_another_sweep_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path)
    Sweep(settings)
    Sweep(replace(settings, trials=12, parallel=1, pruner="none"))
    with pytest.raises(
        UserError, match=r"settings is \['train\.steps=9'\], but the sweep in .* started with .*another dir"
    ):
        Sweep(replace(settings, settings=("train.steps=9",)))


def test_a_wandb_agent_s_command_is_one_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command is built as `wandb agent` does, from the shipped definition and received values."""
    monkeypatch.setenv("ICTX_SWEEP_DIR", str(tmp_path))
    monkeypatch.setenv("ICTX_SWEEP_DATA", "data/1")
    definition = yaml.safe_load((CONFIGS / "tiny-wandb.yaml").read_text())
    ours = config(tmp_path)
    assert list(definition["parameters"]) == list(ours.space)
    assert (definition["metric"]["name"], definition["name"]) == (ours.metric, ours.name)
    values = {"optimizer.learning_rate": {"value": 0.003}, "optimizer.warmup_steps": {"value": 7}}
    given = create_sweep_command_args({"args": values})["args_no_hyphens"]
    words = create_sweep_command(definition["command"])
    place = words.index("${args_no_hyphens}")
    arguments = parser().parse_args([*words[1:place], *given, *words[place + 1 :]])
    assert arguments.action == "trial"
    found = load(arguments.config, arguments.set, arguments.train)
    command = training(found, tmp_path / "agent-1", {}, "parent")
    for setting in ("data.dir=data/1", "optimizer.learning_rate=0.003", "optimizer.warmup_steps=7"):
        assert f"--set={setting}" in command


def test_settings_of_an_agent_s_args_are_those_of_the_run() -> None:
    given = ["--optimizer.learning_rate=0.003", "--train.lora.rank=4"]
    train = parser().parse_args(with_agents_settings(["train", "sft", "--config", "sft/tiny.yaml", *given]))
    assert train.set == ["optimizer.learning_rate=0.003", "train.lora.rank=4"]
    words = ["sweep", "trial", "sweep/tiny.yaml", "--set=dir=a", "--train", "data.dir=b", *given]
    assert parser().parse_args(with_agents_settings(words)).train == ["data.dir=b", *train.set]
    for others in (["data", "prepare", *given], ["train", "sft", "--profile=3"], []):
        assert with_agents_settings(others) == others


@pytest.mark.full
def test_a_wandb_agent_trains_what_its_server_hands_out(commands: Commands, prepared: Path, tmp_path: Path) -> None:
    """Runs the real `wandb agent`; `WandbServer` replaces W&B's server, which tests cannot reach."""
    trial = [*map(str, sweep_of(commands, prepared, tmp_path / "sweep")), "--set=settings=[train.steps=6]"]
    with WandbServer() as server:
        server.sweep = yaml.safe_dump({"command": ["${env}", "ictx", "sweep", "trial", *trial, "${args}"]})
        server.trials = {"one": {"optimizer.learning_rate": 0.003}, "two": {"optimizer.learning_rate": 1e-06}}
        rates = {run: values["optimizer.learning_rate"] for run, values in server.trials.items()}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        agent = subprocess.run(
            [sys.executable, "-m", "wandb", "agent", "team/project/s"],
            env=environment(commands, server, tmp_path) | {"PATH": path},
            cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        server.shutdown()
    assert agent.returncode == 0, agent
    assert server.exit_codes == {"one": [0], "two": [0]}, agent
    for run, rate in rates.items():
        metrics = read_records(tmp_path / "sweep" / f"agent-{run}" / "metrics.jsonl")
        assert [row["loss"] for row in server.history[run]] == [record["loss"] for record in metrics]
        assert len(metrics) == 6 and max(record["learning_rate"] for record in metrics) == pytest.approx(rate)
        assert server.upserts[run]["sweep"] == "s" and server.upserts[run]["project"] == "project"
    client, parent = MlflowClient(commands.tracking_uri), (tmp_path / "sweep" / "mlflow_run_id").read_text().strip()
    experiments = [client.get_run(parent).info.experiment_id]
    below = client.search_runs(experiments, f"tags.`mlflow.parentRunId` = '{parent}'")
    assert sorted(run.data.tags["wandb.run_id"] for run in below) == ["one", "two"]


def test_values_of_any_kind_reach_the_training_as_they_are(tmp_path: Path) -> None:
    values = {"a.b": 1e-5, "a.c": True, "a.d": "muon", "a.e": "no", "a.f": None, "a.g": 12}
    command = training(config(tmp_path), tmp_path / "trial-0003", values, "parent")
    given = dict(each.removeprefix("--set=").split("=", 1) for each in command if each.startswith("--set="))
    assert {name: yaml.safe_load(given[name]) for name in values} == values
    assert (given["track.name"], given["track.group"], given["track.parent"]) == (
        "tiny-rate-0003",
        "tiny-rate",
        "parent",
    )


SPACE = "{optimizer.learning_rate: {choices: [0.01, 1.0e-6]}}"


def sweep_of(commands: Commands, prepared: Path, folder: Path, *further: str) -> list[object]:
    """Returns the arguments of a sweep with a good value and one with which training fails to learn."""
    base = folder.parent / "sweep.yaml"
    base.write_text((CONFIGS / "tiny.yaml").read_text())
    wanted = [
        f"dir={folder}",
        f"config={commands.folder / 'test.yaml'}",
        f"space={SPACE}",
        "startup_trials=1",
        *further,
    ]
    wanted += ["settings=[train.steps=40,train.validate_every=5,train.checkpoint_every=5,train.validation_windows=8]"]
    return [base, *(f"--set={each}" for each in wanted), "--train", f"data.dir={prepared}"]


def children(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(status.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.full
def test_a_sweep_ends_with_its_best_trial_prunes_and_survives_a_killed_worker(
    commands: Commands, prepared: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    arguments = sweep_of(commands, prepared, folder, "seed=28")
    process = commands.start("sweep", *arguments)
    while not any((folder / "trial-0000" / "checkpoints").glob("step-????????")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    # The worker of trial 0.
    (worker,) = [pid for pid in children(process.pid) if holds(pid, folder / "trial-0000" / "worker")]
    os.kill(worker, signal.SIGKILL)
    ended = commands.end(process)
    assert ended.status == 0, ended
    assert "a worker was killed by signal 9: starting another one" in ended.out
    assert "trial 0: its worker was lost" in ended.out
    assert "resuming after step" in (folder / "trial-0000" / "log").read_text()
    result = json.loads((folder / "result.json").read_text())
    assert f"best of 6 trials: {result['best_trial']}, validation_loss" in ended.out
    assert result["trials"] == 6 and result["settings"] == {"optimizer.learning_rate": 0.01}
    trials = Sweep(load(str(arguments[0]), [f"dir={folder}"], []), reading=True).trials()
    states = [trial.state for trial in trials]
    assert states.count(TrialState.PRUNED) >= 1 and {*states} == {TrialState.PRUNED, TrialState.COMPLETE}, states
    for trial in trials:
        steps = [each["step"] for each in read_records(folder / f"trial-{trial.number:04}" / "metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1)), "each step must be recorded once"
        assert (len(steps) < 40) == (trial.state == TrialState.PRUNED)
        assert trial.state == TrialState.COMPLETE or trial.params == {"optimizer.learning_rate": 1e-6}
    assert trials[0].user_attrs["crashes"] == 1
    # MLflow has one run for the sweep, and a child run for each trial.
    client = MlflowClient(commands.tracking_uri)
    parent = (folder / "mlflow_run_id").read_text().strip()
    experiment = client.get_run(parent).info.experiment_id
    below = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert sorted(run.info.run_name for run in below) == [f"tiny-rate-{number:04}" for number in range(6)]
    assert {item.path for item in client.list_artifacts(parent, "report")} >= {"report/sweep.png", "report/best.yaml"}
    assert client.get_run(parent).info.status == "FINISHED"
    assert (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["optimizer"]["learning_rate"] == 0.01 and best["train"]["steps"] == 40
    # Another worker has nothing to do; the table shows all trials.
    assert commands.run("sweep", "run", *arguments).status == 0
    shown = commands.run("sweep", "status", *arguments).out
    assert shown.count("pruned") == states.count(TrialState.PRUNED) and len(shown.splitlines()) == 7
    assert f"best of 6 trials: {result['best_trial']}" in commands.run("sweep", "best", *arguments).out


def holds(pid: int, path: Path) -> bool:
    """Returns whether a process has a file open."""
    return any(os.path.realpath(each) == str(path.resolve()) for each in Path(f"/proc/{pid}/fd").glob("*"))


@pytest.mark.full
def test_a_sweep_that_cannot_begin_names_the_reason_once(commands: Commands, prepared: Path, tmp_path: Path) -> None:
    arguments = sweep_of(commands, prepared, tmp_path / "sweep", "parallel=1", "space={optimizer.rate: {choices: [1]}}")
    ended = commands.run("sweep", *arguments)
    assert ended.status == 2 and ended.err.count("unknown setting optimizer.rate: ") == 1, ended
    assert sys.executable and not (tmp_path / "sweep" / "trial-0001").exists()
