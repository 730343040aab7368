"""The trials of a sweep, shared by its workers: Optuna's journal on shared storage, and locks of trials.

A worker and the training process that it starts hold a lock on the trial's folder. The kernel releases it when both
have ended for any reason, including a failure of the node: a running trial with a free lock has lost its worker. The
next worker resumes it from its last checkpoint. Optuna's heartbeat is not used: it requires a database server and
restarts trials from the beginning.
"""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from ictx.errors import UserError
from ictx.folder import write_whole
from ictx.sweep.config import Range, SweepConfig

STOPPED_FILE = "stopped"
"""File in a trial's folder: its worker received SIGTERM, which does not count as a failure."""
CRASHES = "crashes"
"""Attribute of a trial: number of failed starts."""
DEFINITION = ("stage", "config", "settings", "space", "metric", "direction")
"""Settings that must not change when a sweep is started again, because results would not be comparable."""


@dataclass
class Claim:
    """A trial that this worker has locked."""

    trial: Trial
    folder: Path
    lock: int
    """Descriptor of the locked file, inherited by the training processes."""

    def release(self) -> None:
        """Releases the trial for other workers."""
        os.close(self.lock)


class Sweep:
    """A sweep's folder."""

    def __init__(self, config: SweepConfig, reading: bool = False) -> None:
        """Opens or creates the folder. Raises UserError if it belongs to another sweep, unless `reading`."""
        assert config.dir
        self.config, self.folder = config, config.dir.resolve()
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        with self.exclusive():
            if not reading:
                self._check_definition()
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            # SQLite's locks are not reliable on NFS; creating a link is atomic.
            storage = JournalStorage(JournalFileBackend(str(self.folder / "journal")))
            self.study = optuna.create_study(
                study_name=config.name,
                storage=storage,
                direction=config.direction,
                pruner=_pruner(config),
                load_if_exists=True,
            )

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds the sweep's lock."""
        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _check_definition(self) -> None:
        note, values = self.folder / "sweep.yaml", asdict(self.config)
        now = yaml.safe_load(yaml.safe_dump({name: _plain(values[name]) for name in DEFINITION}))
        if not note.exists():
            write_whole(note, yaml.safe_dump(now, sort_keys=False))
        before = yaml.safe_load(note.read_text())
        for name in DEFINITION:
            if before.get(name) != now[name]:
                raise UserError(
                    f"{name} is {now[name]}, but the sweep in {self.folder} started with {before.get(name)}: use that "
                    "value, or another dir"
                )

    def trials(self) -> list[FrozenTrial]:
        """Returns all trials in their current state."""
        return self.study.get_trials(deepcopy=False)

    def folder_of(self, number: int) -> Path:
        """Returns a trial's folder: the run.dir of its run."""
        return self.folder / f"trial-{number:04}"

    def finished(self) -> bool:
        """Returns whether all trials are finished."""
        trials = self.trials()
        return len(trials) >= self.config.trials and all(trial.state.is_finished() for trial in trials)

    def claim(self) -> Claim | None:
        """Returns a trial that lost its worker, else a new one; None if all are finished or locked."""
        with self.exclusive():
            for frozen in self.trials():
                if frozen.state == TrialState.RUNNING and (found := self._take_over(frozen)):
                    return found
            count = len(self.trials())
            if count >= self.config.trials:
                return None
            # A different seed per trial: workers that choose at the same time must not choose the same values.
            self.study.sampler = _sampler(self.config.seed + count)
            trial = self.study.ask(distributions(self.config.space))
            lock = self._lock(trial.number)
            assert lock is not None
            return Claim(trial, self.folder_of(trial.number), lock)

    def _take_over(self, frozen: FrozenTrial) -> Claim | None:
        lock = self._lock(frozen.number)
        if lock is None:
            return None
        claim = Claim(Trial(self.study, frozen._trial_id), self.folder_of(frozen.number), lock)
        try:
            (claim.folder / STOPPED_FILE).unlink()
        except FileNotFoundError:
            print(f"trial {frozen.number}: its worker was lost", flush=True)
            if not self.crashed(claim.trial):
                claim.release()
                return None
        return claim

    def crashed(self, trial: Trial) -> bool:
        """Records a failed start of a trial; returns whether to restart it, or False once the trial has failed."""
        crashes = trial.user_attrs.get(CRASHES, 0) + 1
        trial.set_user_attr(CRASHES, crashes)
        if crashes <= self.config.retries:
            return True
        self.study.tell(trial, state=TrialState.FAIL)
        print(f"trial {trial.number}: failed after {crashes} starts (retries)", flush=True)
        return False

    def _lock(self, number: int) -> int | None:
        """Returns a descriptor with the trial's lock; None if another worker or its training holds it."""
        folder = self.folder_of(number)
        folder.mkdir(mode=0o755, exist_ok=True)
        lock = os.open(folder / "worker", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock

    def best(self) -> FrozenTrial | None:
        """Returns the best completed trial; None without one."""
        ended = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
        sign = 1 if self.config.direction == "minimize" else -1
        return min(ended, key=lambda trial: sign * (trial.value or 0.0), default=None)


def distributions(space: Any) -> dict[str, BaseDistribution]:
    """Converts the ranges of a space to Optuna's distributions."""
    return {name: _distribution(each) for name, each in space.items()}


def _distribution(each: Range) -> BaseDistribution:
    if each.choices:
        return CategoricalDistribution(each.choices)
    assert each.low is not None and each.high is not None
    if isinstance(each.low, int) and isinstance(each.high, int):
        return IntDistribution(each.low, each.high, each.log, int(each.step or 1))
    return FloatDistribution(float(each.low), float(each.high), each.log, each.step)


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # Running trials count as bad ones, so that other workers explore other values.
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def _pruner(config: SweepConfig) -> optuna.pruners.BasePruner:
    if config.pruner == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(config.startup_trials, config.warmup_steps)


def _plain(value: Any) -> Any:
    """Converts a value to a YAML type."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
