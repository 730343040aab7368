"""Settings of a sweep."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ictx.errors import UserError
from ictx.settings import build, config_path, load_yaml, override, shown

OURS = ("run.dir", "run.experiment", "run.model_name", "track.group", "track.name", "track.parent")
"""Settings of runs that the sweep sets itself."""
Choice = bool | int | float | str


@dataclass(frozen=True)
class Range:
    """Values of a setting: from `low` to `high`, or one of `choices`."""

    low: int | float | None = None
    """Lowest value; only integers are tried if both ends are integers."""
    high: int | float | None = None
    """Highest value."""
    log: bool = False
    """Sample uniformly in the logarithm, as for learning rates."""
    step: int | float | None = None
    """Step between values."""
    choices: tuple[Choice, ...] = ()
    """Values, instead of a range."""

    def __post_init__(self) -> None:
        if self.choices:
            if not (self.low is self.high is self.step is None):
                raise ValueError("choices is set: leave low, high and step out")
            return
        if self.low is None or self.high is None or not self.low < self.high:
            raise ValueError(f"low is {self.low}, high is {self.high}: expected low < high, or choices")
        if self.log and not self.low > 0:
            raise ValueError(f"low is {self.low}: expected more than 0 with log: true")
        if self.step is not None and (self.log or not self.step > 0):
            raise ValueError(f"step is {self.step}: expected more than 0, and log: false")


@dataclass(frozen=True)
class SweepConfig:
    """A sweep."""

    config: str
    """Configuration of each run, for `ictx train --config`."""
    space: Mapping[str, Range]
    """Search space by setting, such as optimizer.learning_rate."""
    name: str
    """Name of the sweep, of its MLflow run and of its W&B group."""
    trials: int
    """Total number of runs."""
    dir: Path | None = None
    """Folder of the sweep and its runs, on storage that all workers share."""
    stage: str = "pretrain"
    """Stage of `ictx train`."""
    settings: tuple[str, ...] = ()
    """Settings of every run: SECTION.KEY=VALUE."""
    launch: tuple[str, ...] = ()
    """Launcher of a run's ranks, to which the `ictx` arguments are appended: [torchrun, --nproc-per-node=4, -m, ictx];
    default: one rank."""
    parallel: int = 1
    """Number of workers that `ictx sweep CONFIG` starts; the machine's GPUs are divided among them."""
    metric: str = "validation_loss"
    """Metric of metrics.jsonl to optimize; its last value counts."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Direction of the optimization."""
    pruner: Literal["median", "none"] = "median"
    """`median`: stop runs that are worse than the median of the others at the same step; `none`: no pruning."""
    startup_trials: int = 4
    """Number of finished runs before pruning starts."""
    warmup_steps: int = 0
    """Minimum steps of a run before it can be pruned."""
    retries: int = 2
    """Restarts of a run that crashed or lost its worker; it resumes from its last checkpoint."""
    seed: int = 0
    """Random seed of the search."""
    experiment: str = "sweep"
    """MLflow experiment."""

    def __post_init__(self) -> None:
        if not self.space:
            raise ValueError("space is empty: expected settings to try")
        for name in ("trials", "parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")
        for name in ("startup_trials", "warmup_steps", "retries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 or more")
        if not re.fullmatch(r"\w[\w .+-]{0,99}", self.name):
            raise ValueError(f"name is {shown(self.name)}: expected letters, digits, spaces and . _ + -")
        for each in (*self.settings, *self.space):
            if each.partition("=")[0].strip() in OURS:
                raise ValueError(f"{shown(each)} is set by the sweep: leave it out")


def load(name: str, assignments: list[str], further: list[str]) -> SweepConfig:
    """Reads a sweep's settings; `further` ones are settings of every run. Raises UserError."""
    content = override(load_yaml(config_path(name)), assignments)
    if isinstance(given := content.get("settings", []), list):
        content["settings"] = [*given, *further]
    config = build(SweepConfig, content)
    if config.dir is None:
        raise UserError("dir is not set: add --set dir=FOLDER, on storage that all workers share")
    return config
