"""What a sweep tries, and how often."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ictx.errors import UserError
from ictx.settings import build, config_path, load_yaml, override, shown

OURS = ("run.dir", "run.experiment", "run.model_name", "track.group", "track.name", "track.parent")
"""Settings of each run that follow from the sweep's."""
Choice = bool | int | float | str


@dataclass(frozen=True)
class Range:
    """Values of a setting: from `low` to `high`, or one of `choices`."""

    low: int | float | None = None
    """Lowest value; whole numbers where both ends are."""
    high: int | float | None = None
    """Highest value."""
    log: bool = False
    """Uniform in the logarithm, as for learning rates."""
    step: int | float | None = None
    """Distance of neighbouring values."""
    choices: tuple[Choice, ...] = ()
    """Values, instead of a range."""

    def __post_init__(self) -> None:
        if self.choices:
            if not (self.low is self.high is self.step is None):
                raise ValueError("choices are values by themselves: expected no low, high and step")
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
    """Configuration of each run, as `ictx train` reads it."""
    space: Mapping[str, Range]
    """What is tried, by the name of the setting, such as optimizer.learning_rate."""
    name: str
    """Of the sweep: its MLflow run, and the group of its runs in W&B."""
    trials: int
    """Runs in all."""
    dir: Path | None = None
    """Folder of the sweep, with one of each run, on storage that all workers have."""
    stage: str = "pretrain"
    """What `ictx train` does."""
    settings: tuple[str, ...] = ()
    """Settings of every run: SECTION.KEY=VALUE."""
    launch: tuple[str, ...] = ()
    """Starts a run's ranks, with `ictx` arguments after it: [torchrun, --nproc-per-node=4, -m, ictx]; one rank unless
    given."""
    parallel: int = 1
    """Workers that `ictx sweep CONFIG` starts; they share out the GPUs of this machine."""
    metric: str = "validation_loss"
    """Measure that is optimized, of those in metrics.jsonl; the last one counts."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """What is better: less, or more."""
    pruner: Literal["median", "none"] = "median"
    """`median`: stop a run that is worse than the median of the others at the same step; `none`."""
    startup_trials: int = 4
    """Finished runs that the median needs."""
    warmup_steps: int = 0
    """Steps of a run before which it is not stopped."""
    retries: int = 2
    """Further starts of a run that crashed, or whose worker was lost; it goes on from its last checkpoint."""
    seed: int = 0
    """Of the choice of values."""
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
                raise ValueError(f"{shown(each)} is for the sweep to choose: leave it out")


def load(name: str, assignments: list[str], further: list[str]) -> SweepConfig:
    """Reads a sweep's settings; `further` ones are settings of every run. Raises UserError."""
    content = override(load_yaml(config_path(name)), assignments)
    if isinstance(given := content.get("settings", []), list):
        content["settings"] = [*given, *further]
    config = build(SweepConfig, content)
    if config.dir is None:
        raise UserError("dir is needed: --set dir=FOLDER, on storage that all workers have")
    return config
