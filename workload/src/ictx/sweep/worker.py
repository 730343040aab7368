"""A worker: trains trials, each in a separate process, reports their metrics to Optuna, and prunes bad ones."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from optuna.trial import Trial, TrialState

from ictx.errors import UserError, printable
from ictx.sweep.config import SweepConfig
from ictx.sweep.report import Parent
from ictx.sweep.study import STOPPED_FILE, Claim, Sweep
from ictx.track.records import read_records

POLL_SECONDS = 0.2
IDLE_SECONDS = 120.0
"""Seconds to wait for trials of lost workers; longer than a run needs to save a checkpoint."""
BAD_INPUT, STOPPED = 2, 75
"""Exit statuses of `ictx train`: invalid settings or data; interrupted after saving a checkpoint."""
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def training(config: SweepConfig, folder: Path, values: Mapping[str, Any], parent: str) -> list[str]:
    """Returns the command that trains with these values in a folder, with the sweep's MLflow run as the parent."""
    ours = {
        "run.dir": str(folder),
        "run.experiment": config.experiment,
        "run.model_name": None,
        "track.group": config.name,
        "track.name": f"{config.name}-{folder.name.partition('-')[2]}",
        "track.parent": parent,
    }
    wanted = [f"{name}={_yaml(value)}" for name, value in [*values.items(), *ours.items()]]
    launch = config.launch or (sys.executable, "-m", "ictx")
    settings = [f"--set={each}" for each in (*config.settings, *wanted)]
    return [*launch, "train", config.stage, "--config", config.config, *settings]


def _yaml(value: Any) -> str:
    """Returns a value in one line of YAML."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize)
    return text.removesuffix("\n...\n").removesuffix("\n")


class Worker:
    """Runs trials of a sweep until none is left to start."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.config = sweep, sweep.config
        with sweep.exclusive():
            self.parent = Parent(sweep)
        self.process: subprocess.Popen[bytes] | None = None
        self.told_to_stop = False

    def work(self) -> int:
        """Runs trials. Returns 0, or 75 after SIGTERM: the next worker then resumes the trial.

        Raises UserError if a trial fails because of its settings or data before any trial has reported a metric.
        """
        signal.signal(signal.SIGTERM, self._stop)
        while claim := self._next():
            try:
                self._train(claim)
            finally:
                claim.release()
        if self.sweep.finished():
            with self.sweep.exclusive():
                self.parent.conclude()
            return 0
        return STOPPED if self.told_to_stop else 0

    def _next(self) -> Claim | None:
        """Returns the next trial; at the end, waits for trials whose workers may just have been lost."""
        end = time.monotonic() + IDLE_SECONDS
        while not (self.told_to_stop or (found := self.sweep.claim())):
            if self.sweep.finished() or time.monotonic() > end:
                return None
            time.sleep(1)
        return None if self.told_to_stop else found

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.told_to_stop = True
        if self.process:
            self.process.send_signal(signal.SIGTERM)

    def _train(self, claim: Claim) -> None:
        """Trains until the trial is finished, or the worker is signalled to stop."""
        trial, say = claim.trial, f"trial {claim.trial.number}:"
        command = training(self.config, claim.folder, trial.params, self.parent.run_id)
        print(say, ", ".join(f"{name}={value}" for name, value in trial.params.items()), flush=True)
        while True:
            status, pruned = self._run(claim, command)
            value = _last(claim.folder, self.config.metric)
            if status == 0 and value is not None:
                self.sweep.study.tell(trial, value)
                print(say, f"{self.config.metric} {value:.6g}", flush=True)
            elif pruned:
                self.sweep.study.tell(trial, state=TrialState.PRUNED)
                print(say, f"pruned, {self.config.metric} {value}", flush=True)
            elif self.told_to_stop:
                (claim.folder / STOPPED_FILE).touch()
            elif status in (0, BAD_INPUT):
                self.sweep.study.tell(trial, state=TrialState.FAIL)
                reason = _last_line(claim.folder / "log") if status else f"no {self.config.metric} in its metrics.jsonl"
                print(say, f"failed: {reason}", flush=True)
                if not any(each.intermediate_values for each in self.sweep.trials()):
                    raise UserError(f"no trial has reported a metric: {reason} ({claim.folder / 'log'})")
            else:
                print(say, f"ended with status {status}: {_last_line(claim.folder / 'log')}", flush=True)
                if self.sweep.crashed(trial):
                    continue
            return

    def _run(self, claim: Claim, command: list[str]) -> tuple[int, bool]:
        """Trains once; returns the exit status, and whether the trial was pruned."""
        pruned = False
        with (claim.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                # If the worker is lost, the run saves a checkpoint and ends; until then it keeps the trial locked.
                preexec_fn=_end_with_parent,
                pass_fds=[claim.lock],
            )
            while self.process.poll() is None:
                time.sleep(POLL_SECONDS)
                if self._report(claim) and not pruned:
                    pruned = True
                    self.process.send_signal(signal.SIGTERM)
                if self.told_to_stop:
                    # The signal may have arrived before the process was started.
                    with suppress(ProcessLookupError):
                        self.process.send_signal(signal.SIGTERM)
                    self.process.wait()
            status = self.process.returncode
            self.process = None
        self._report(claim)
        return status, pruned

    def _report(self, claim: Claim) -> bool:
        """Reports new metrics to Optuna; returns whether to prune the trial."""
        trial: Trial = claim.trial
        known = max(self.sweep.trials()[trial.number].intermediate_values, default=-1)
        behind = False
        for record in read_records(claim.folder / "metrics.jsonl"):
            if self.config.metric in record and record["step"] > known:
                trial.report(record[self.config.metric], int(record["step"]))
                behind = trial.should_prune()
        return behind


def _end_with_parent() -> None:
    """Makes the kernel send this process SIGTERM when the worker exits (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _last(folder: Path, metric: str) -> float | None:
    """Returns the last value of a run's metric."""
    return next((each[metric] for each in reversed(read_records(folder / "metrics.jsonl")) if metric in each), None)


def _last_line(log: Path) -> str:
    """Returns the last line of a run's output."""
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines() or ["it printed nothing"]
    return printable(lines[-1])[:500]
