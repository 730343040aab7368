"""Results of a sweep: its MLflow run (the parent of its trials' runs), the best settings, a table and a plot."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from mlflow.exceptions import MlflowException
from optuna.trial import FrozenTrial, TrialState

from ictx.errors import UserError
from ictx.folder import write_whole
from ictx.registry import explained
from ictx.settings import config_path, load_yaml, override
from ictx.sweep.study import Sweep
from ictx.track.config import TrackConfig
from ictx.track.mlflow import Tracker

COLORS = {TrialState.COMPLETE: "tab:blue", TrialState.PRUNED: "tab:orange", TrialState.FAIL: "tab:red"}
PATIENCE = 300.0


class Parent:
    """The MLflow run of a sweep."""

    def __init__(self, sweep: Sweep) -> None:
        """Continues or creates the run; the caller must hold the sweep's lock."""
        self.sweep = sweep
        with explained():
            self.tracker = Tracker(
                sweep.folder,
                sweep.config.experiment,
                asdict(sweep.config),
                PATIENCE,
                track=TrackConfig(name=sweep.config.name),
            )

    @property
    def run_id(self) -> str:
        """Id of the MLflow run."""
        return self.tracker.run_id

    def conclude(self) -> None:
        """Writes the results to the sweep's folder and MLflow, once. Raises UserError if no trial succeeded."""
        sweep, best, result = self.sweep, self.sweep.best(), self.sweep.folder / "result.json"
        if result.exists() and json.loads(result.read_text())["trials"] == len(sweep.trials()):
            return
        if best is None or best.value is None:
            raise UserError(f"no trial of {sweep.config.name} completed: see {sweep.folder}/trial-*/log")
        write_best(sweep, best)
        plot(sweep, sweep.folder / "sweep.png")
        write_whole(sweep.folder / "trials.txt", table(sweep) + "\n")
        print(summary(sweep, best), flush=True)
        try:
            self.tracker.tag({"ictx.sweep.best_trial": str(best.number)})
            for name in ("best.yaml", "sweep.png", "trials.txt"):
                self.tracker.client.log_artifact(self.run_id, str(sweep.folder / name), "report")
            self.tracker.client.log_metric(self.run_id, f"best_{sweep.config.metric}", best.value)
            self.tracker.finish("FINISHED")
        except MlflowException as error:
            print(f"cannot report to MLflow ({self.tracker.reason(error)}): see {sweep.folder}", flush=True)
        outcome: dict[str, Any] = {
            "trials": len(sweep.trials()),
            "best_trial": best.number,
            sweep.config.metric: best.value,
        }
        outcome |= {"settings": best.params, "run_dir": str(sweep.folder_of(best.number)), "mlflow_run_id": self.run_id}
        write_whole(result, json.dumps(outcome, indent=1) + "\n")


def summary(sweep: Sweep, best: FrozenTrial) -> str:
    """Returns one line about the best trial."""
    chosen = " ".join(f"{name}={value}" for name, value in best.params.items())
    return (
        f"best of {len(sweep.trials())} trials: {best.number}, {sweep.config.metric} {best.value:.6g} with {chosen}; "
        f"its configuration: {sweep.folder / 'best.yaml'}"
    )


def write_best(sweep: Sweep, best: FrozenTrial) -> None:
    """Writes best.yaml for `ictx train`: the sweep's configuration with the settings of the best trial."""
    content = load_yaml(config_path(sweep.config.config))
    chosen = [f"{name}={yaml.safe_dump(value).splitlines()[0]}" for name, value in best.params.items()]
    content = override(content, [*sweep.config.settings, *chosen])
    head = f"# Trial {best.number} of the sweep {sweep.config.name}: {sweep.config.metric} {best.value:.6g}.\n"
    write_whole(sweep.folder / "best.yaml", head + yaml.safe_dump(content, sort_keys=False))


def table(sweep: Sweep) -> str:
    """Returns a table of the trials: number, state, last value, last step, crashes, settings."""
    rows = [("trial", "state", sweep.config.metric, "step", "crashes", "settings")]
    for trial in sweep.trials():
        value = "" if trial.value is None else f"{trial.value:.6g}"
        if trial.value is None and trial.intermediate_values:
            value = f"{trial.intermediate_values[max(trial.intermediate_values)]:.6g}"
        step, crashes = str(max(trial.intermediate_values, default="")), str(trial.user_attrs.get("crashes", 0))
        chosen = " ".join(f"{name}={each}" for name, each in trial.params.items())
        rows.append((str(trial.number), trial.state.name.lower(), value, step, crashes, chosen))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def plot(sweep: Sweep, path: Path) -> None:
    """Plots each trial's metric over steps, and its last value against each setting."""
    names, metric = list(sweep.config.space), sweep.config.metric
    figure = Figure(figsize=(5 * (len(names) + 1), 4), layout="constrained")
    course, *others = figure.subplots(1, len(names) + 1, squeeze=False)[0]
    best = sweep.best()
    for trial in sweep.trials():
        points = sorted(trial.intermediate_values.items())
        if not points:
            continue
        color, wide = COLORS.get(trial.state, "tab:gray"), best is not None and trial.number == best.number
        course.plot(*zip(*points, strict=True), color=color, marker=".", linewidth=3 if wide else 1)
        for name, axes in zip(names, others, strict=True):
            axes.scatter([trial.params[name]], [points[-1][1]], color=color, s=80 if wide else 25)
    course.set(xlabel="step", ylabel=metric, title=sweep.config.name)
    for name, axes in zip(names, others, strict=True):
        axes.set(xlabel=name, xscale="log" if sweep.config.space[name].log else "linear")
    for state, color in COLORS.items():
        course.plot([], [], color=color, label=state.name.lower())
    course.legend()
    draft = path.with_suffix(".part.png")
    figure.savefig(draft, dpi=100)
    draft.replace(path)
