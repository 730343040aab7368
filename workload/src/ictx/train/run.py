"""The training loop of all stages: step, check, log, evaluate, save, stop, publish."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from ictx.errors import UserError
from ictx.folder import write_whole
from ictx.metrics import flops_per_token, model_flops_utilisation, peak_flops, write_about
from ictx.parallel import Layout, float8
from ictx.parallel.communication import COLLECTIVES
from ictx.stopwatch import Stopwatch
from ictx.track import wandb
from ictx.track.config import TrackConfig
from ictx.track.journal import Journal
from ictx.train.checkpoint import MODEL_FILE, Checkpoints
from ictx.train.config import RunConfig, StageConfig
from ictx.train.failures import explained
from ictx.train.lock import locked
from ictx.train.optimizer import learning_rate
from ictx.train.profiler import traced
from ictx.train.publish import publish, whole
from ictx.train.ranks import Ranks, joined, on_all
from ictx.train.stage import Stage, lineage
from ictx.train.state import TrainingState
from ictx.train.update import Updater
from ictx.train.watchdog import Watchdog

# EX_TEMPFAIL of sysexits.h: a checkpoint is saved, start the command again.
STOPPED = 75
# Names of laps in records: the parts of a step, then the work between steps.
STEP_PARTS = ("data", "forward", "backward", "optimizer", "ranks")
PAUSES = ("evaluation", "checkpoint")


class Run:
    """One start of a run; resumes from an earlier start's checkpoint."""

    def __init__(self, stage: Stage, config: StageConfig, ranks: Ranks, directory: Path) -> None:
        """Creates the sharded model and loads the newest checkpoint. Raises UserError for incompatible data."""
        self.stage, self.config, self.ranks, self.directory = stage, config, ranks, directory
        loop = config.train
        if loop.fp8 != "none":
            float8.check(loop.fp8, ranks.device)
        if loop.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.state = TrainingState(stage, config, ranks, directory)
        self.checkpoints = Checkpoints(directory / "checkpoints", loop.keep_checkpoints)
        self.resumed_from = self.state.resume(self.checkpoints)
        self.journal = new_journal(stage, config, ranks, directory, self.resumed_from)
        # All ranks have started: from now on the short timeout applies.
        ranks.limit(loop.timeout)
        self.stopwatch = Stopwatch(ranks.device)
        COLLECTIVES.device = ranks.device if ranks.count > 1 else None
        self.watchdog = Watchdog(ranks, loop.timeout, directory / "hang")
        self.updater = Updater(self.state, self.stopwatch, self.watchdog)
        self.step_number = self.saved = self.recorded = self.resumed_from
        self.busy, self.skipped, self.bad_in_a_row, self.roll_backs_in_a_row = 0.0, 0, 0, 0
        self.saving: tuple[int, Future[Path]] | None = None

    def close(self, wait: bool) -> None:
        """Stops threads; `wait` for a checkpoint that is being written. Do not wait if a rank is lost."""
        self.checkpoints.close(wait)
        self.watchdog.close()

    def train(self) -> dict[str, Any] | None:
        """Trains to the last step; returns the result, or None if signalled to stop (a checkpoint is saved then)."""
        loop, began, due = self.config.train, time.monotonic(), False
        if self.stage.parent and not self.step_number:
            self.state.progress.parent_loss = self._examine(0)["validation_loss"]
            COLLECTIVES.read()
            self.journal.say(f"validation loss of {self.stage.parent.init}: {self.state.progress.parent_loss:.3f}")
        with traced(loop.profile, self.directory / "profile", self.ranks.rank) as tick:
            while self.step_number < loop.steps:
                self.step_number += 1
                step, last = self.step_number, self.step_number == loop.steps
                record = self._step(step)
                bad = self.bad_in_a_row > 0
                if self.bad_in_a_row > loop.bad_steps:
                    self._roll_back(record)
                    continue
                if step % loop.log_every == 0 or last:
                    self._record(step, record)
                tick()
                self._collect(wait=False)
                # Not during a series of bad steps: the weights that led to it must not replace a better checkpoint.
                due |= step % loop.checkpoint_every == 0 or self.updater.stops > 0
                if (due and not bad) or last:
                    self._save(step, wait=last or self.updater.stops > 0)
                    due = False
                if self.updater.stops and not bad and not last:
                    self.journal.say(f"stop requested: stopped after step {step}")
                    return None
        self.watchdog.rest()
        progress, losses = self.state.progress, self.state.losses
        return {
            "final_loss": losses["loss"],
            **({} if progress.parent_loss is None else {"val_loss_before": progress.parent_loss}),
            "val_loss": losses["validation_loss"],
            "steps": loop.steps,
            "tokens": progress.tokens,
            "skipped_steps": progress.skipped_steps,
            "roll_backs": progress.roll_backs,
            "resumed_from_step": self.resumed_from,
            "seconds": round(time.monotonic() - began, 1),
            "checkpoint": str(self.checkpoints.complete()[-1]),
        }

    def _step(self, step: int) -> dict[str, float]:
        """Runs a step and updates the counts."""
        start = time.monotonic()
        record = self.updater.step(step)
        self.busy += time.monotonic() - start
        self.state.progress.tokens += self.state.tokens_per_step
        if not record.pop("skipped"):
            self.bad_in_a_row = 0
            self.state.losses["loss"] = record["loss"]
            return record
        self.bad_in_a_row += 1
        self.skipped += 1
        self.state.progress.skipped_steps += 1
        self.journal.say(f"{_found(step, record)}: step skipped, weights unchanged")
        return record

    def _roll_back(self, record: dict[str, float]) -> None:
        """Rolls back to the last checkpoint and continues with the data after the bad steps. Raises UserError."""
        loop, step = self.config.train, self.step_number
        self._collect(wait=True)
        found = f"{_found(step, record)}, after {loop.bad_steps} skipped steps (train.bad_steps)"
        if not self.saved or self.roll_backs_in_a_row == loop.roll_backs:
            raise UserError(f"{found}; the last good checkpoint is of step {self.saved}: lower optimizer.learning_rate")
        self.roll_backs_in_a_row += 1
        self.step_number = self.saved = self.recorded = self.state.roll_back(self.checkpoints)
        self.busy, self.skipped, self.bad_in_a_row = 0.0, 0, 0
        self.stopwatch.read()
        COLLECTIVES.read()
        self.journal.rewind(self.saved)
        self.journal.say(
            f"{found}: rolled back to the checkpoint of step {self.saved}, skipping the data since then "
            f"(roll-back {self.roll_backs_in_a_row} of {loop.roll_backs}, train.roll_backs)"
        )

    def _record(self, step: int, record: dict[str, float]) -> None:
        """Logs a record of the steps since the last one; evaluates the model if that is due."""
        loop, ranks, steps = self.config.train, self.ranks, step - self.recorded
        record = {"step": step} | record | {"skipped_steps": self.skipped, "roll_backs": self.state.progress.roll_backs}
        record["learning_rate"] = learning_rate(step, loop.steps, self.config.optimizer)
        record["tokens_per_second"] = steps * self.state.tokens_per_step / self.busy
        record["step_seconds"] = self.busy / steps
        if ranks.count > 1:
            record["communication_seconds"] = COLLECTIVES.read() / steps
        flops, peak = flops_per_token(self.config.model, loop.sequence_length), peak_flops(ranks.device)
        record |= model_flops_utilisation(record["tokens_per_second"], flops, peak and peak * ranks.count)
        line = f"step {step}/{loop.steps}: loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s"
        if step % loop.validate_every == 0 or step == loop.steps:
            record |= self._examine(step)
            line += f", validation loss {record['validation_loss']:.3f}"
        (record["peak_memory_bytes"],) = ranks.largest(peak_memory(ranks.device))
        spent = self.stopwatch.read()
        COLLECTIVES.read()  # drops those of the evaluation
        record |= {f"{part}_seconds": spent.get(part, 0.0) / steps for part in STEP_PARTS + PAUSES}
        self.busy, self.skipped, self.recorded = 0.0, 0, step
        self.journal.record(record)
        self.journal.say(line)

    def _examine(self, step: int) -> dict[str, float]:
        self.watchdog.at(step, "evaluation")
        self.stopwatch.start()
        found = self.stage.examine(self.state.model)
        self.stopwatch.lap("evaluation")
        loss = found["validation_loss"]
        if not math.isfinite(loss):
            raise UserError(
                f"the validation loss is {loss} at step {step}, the last good checkpoint is of step {self.saved}: "
                "lower optimizer.learning_rate"
            )
        self.state.losses["validation_loss"] = loss
        return found

    def _save(self, step: int, wait: bool) -> None:
        """Saves a checkpoint, in the background unless `wait`.

        Its seconds are part of the next record, because a step's record is written before its checkpoint.
        """
        self.watchdog.at(step, "checkpoint")
        self.stopwatch.start()
        self._collect(wait=True)
        if wait:
            self._saved(step, self.checkpoints.save(step, self.state.snapshot()))
        else:
            self.saving = step, self.checkpoints.begin(step, self.state.snapshot())
        self.stopwatch.lap("checkpoint")

    def _collect(self, wait: bool) -> None:
        """Completes a checkpoint that was written in the background; logs the error if it failed."""
        if not self.saving or not (wait or self.saving[1].done()):
            return
        (step, written), self.saving = self.saving, None
        try:
            self._saved(step, written.result())
        except UserError as error:
            self.journal.say(f"{error}: training continues, the last checkpoint is of step {self.saved}")

    def _saved(self, step: int, path: Path) -> None:
        self.journal.say(f"saved {path}")
        self.journal.flush(step)
        self.saved, self.roll_backs_in_a_row = step, 0


def new_journal(stage: Stage, config: StageConfig, ranks: Ranks, directory: Path, resumed_from: int) -> Journal:
    """Returns a run's journal; every rank calls it. Raises UserError if the tracking server is not usable."""
    run, settings, journals = config.run, asdict(config), list[Journal]()

    def make() -> None:
        with explained(directory):
            journals.append(
                Journal(
                    ranks.first, directory, run.experiment, settings, resumed_from, run.tracking_patience,
                    lineage=lineage(stage), track=config.track,
                )
            )  # fmt: skip

    on_all(make)
    return journals[0]


def _found(step: int, record: dict[str, float]) -> str:
    return f"the loss is {record['loss']} at step {step} (gradient norm {record['gradient_norm']})"


def peak_memory(device: torch.device) -> float:
    """Returns peak bytes: allocated on the GPU since the last call, or the process's maximum RSS on other devices."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return float(peak)


def main(stage: Stage, config: StageConfig) -> int:
    """Starts or resumes a run; returns 0, or 75 (EX_TEMPFAIL) if it was signalled to stop and saved a checkpoint.

    Raises UserError with the setting, the path, or the step at which the loss was not finite.
    """
    with begun(config.run, config.parallel, config.track) as (ranks, directory):
        return conduct(stage, config, ranks, directory)


@contextmanager
def begun(settings: RunConfig, layout: Layout, track: TrackConfig) -> Iterator[tuple[Ranks, Path]]:
    """Joins the process group and locks the run's folder; yields both. Raises UserError."""
    directory = settings.dir
    if directory is None:
        raise UserError("run.dir is not set: add --set run.dir=FOLDER")
    wandb.check(track)
    with explained(directory), joined(layout) as ranks, locked(directory, ranks.first):
        yield ranks, directory


def conduct(stage: Stage, config: StageConfig, ranks: Ranks, directory: Path) -> int:
    """Like `main`, with ranks that have already joined."""
    run = Run(stage, config, ranks, directory)
    journal = run.journal
    if ranks.first:
        write_whole(directory / MODEL_FILE, yaml.safe_dump(asdict(config.model), sort_keys=False))
        name = config.run.model_name or config.run.experiment
        write_about(directory, stage.name, name, config.train.steps, run.state.parameters)
    origin = f"from {stage.parent.origin}" if stage.parent else "from the start"
    if run.resumed_from:
        origin = f"resuming after step {run.resumed_from}"
    journal.say(
        f"{run.state.parameters:,} parameters, {run.state.batches.windows:,} windows of "
        f"{config.train.sequence_length} tokens, {ranks.count} ranks on {ranks.device.type}, {origin}"
    )
    lost = False
    try:
        result = run.train()
        if result is None:
            journal.finish("KILLED")
            return STOPPED
        publish(stage, config, whole(run.state.model), journal, result)
    except BaseException as error:
        lost = isinstance(error, RuntimeError)
        journal.finish("FAILED")
        if lost and run.watchdog.verdict:
            raise UserError(run.watchdog.verdict) from error
        raise
    finally:
        run.close(wait=not lost)
    journal.finish("FINISHED")
    return 0
