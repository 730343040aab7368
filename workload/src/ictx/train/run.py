"""The loop that all stages share: step, check, record, examine, save, stop, publish."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ictx.errors import UserError
from ictx.folder import write_whole
from ictx.metrics import flops_per_token, model_flops_utilisation, peak_flops, write_about
from ictx.track.journal import Journal
from ictx.train.checkpoint import MODEL_FILE, Checkpoints
from ictx.train.config import StageConfig
from ictx.train.failures import explained
from ictx.train.optimizer import learning_rate, new_optimizer
from ictx.train.publish import publish
from ictx.train.ranks import Ranks, joined
from ictx.train.sharded import sharded_model
from ictx.train.stage import Stage
from ictx.train.stopwatch import Stopwatch
from ictx.train.update import Updater

# sysexits.h EX_TEMPFAIL: saved, run me again.
STOPPED = 75
# What a record has the seconds of: the parts that make up a step, then what comes between steps.
STEP_PARTS = ("data", "forward", "backward", "optimizer", "ranks")
PAUSES = ("evaluation", "checkpoint")


class Run:
    """One start of a run; it takes up what an earlier start saved."""

    def __init__(self, stage: Stage, config: StageConfig, ranks: Ranks) -> None:
        """Makes the sharded model and loads the newest checkpoint. Raises UserError for data that does not fit."""
        if config.run.dir is None:
            raise UserError("run.dir is needed: --set run.dir=FOLDER")
        self.stage, self.config, self.ranks, self.directory = stage, config, ranks, config.run.dir
        loop = config.train
        self.batches = stage.batches(ranks)
        if loop.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.model = sharded_model(config.model, loop, ranks)
        self.parameters = sum(weight.numel() for weight in self.model.parameters())
        self.optimizer = new_optimizer(self.model, config.optimizer, ranks.device)
        self.stopwatch = Stopwatch(ranks.device)
        self.updater = Updater(stage, config, self.model, self.optimizer, self.batches, ranks, self.stopwatch)
        self.losses = {"loss": math.nan, "validation_loss": math.nan}
        self.checkpoints = Checkpoints(self.directory / "checkpoints", loop.keep_checkpoints)
        self.resumed_from = self._resume()

    def _state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds, in this rank's shards."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "batches": self.batches.state_dict(),
            "losses": self.losses,
            "data": self.stage.fingerprint,
        }

    def _resume(self) -> int:
        """Loads the newest checkpoint and returns its step, or 0."""
        state = self._state()
        step = self.checkpoints.load_newest(state)
        if step:
            set_state_dict(
                self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
            self.batches.load_state_dict(state["batches"])
            self.losses = state["losses"]
        if state["data"] != self.stage.fingerprint:
            raise UserError(
                f"{self.directory} was trained on other data than {self.stage.vocabulary} holds: give the data.dir "
                "that it began with, or another run.dir"
            )
        if step > self.config.train.steps:
            raise UserError(
                f"train.steps is {self.config.train.steps}, but {self.directory} has a checkpoint of step {step}: "
                "raise train.steps or give another run.dir"
            )
        return step

    def train(self, journal: Journal) -> dict[str, Any] | None:
        """Trains to the last step and returns the result, or None when told to stop (a checkpoint is saved then)."""
        loop, ranks = self.config.train, self.ranks
        tokens_per_step = loop.batch_size * ranks.data_count * loop.sequence_length
        flops, each = flops_per_token(self.config.model, loop.sequence_length), peak_flops(ranks.device)
        peak = each * ranks.count if each else None
        if ranks.first:
            name = self.config.run.model_name or self.config.run.experiment
            write_about(self.directory, self.stage.name, name, loop.steps, self.parameters)
        began = time.monotonic()
        saved = logged = self.resumed_from
        busy, skipped, in_a_row, due = 0.0, 0, 0, False
        for step in range(self.resumed_from + 1, loop.steps + 1):
            start = time.monotonic()
            record = self.updater.step(step)
            busy += time.monotonic() - start
            loss, bad = record["loss"], bool(record.pop("skipped"))
            skipped, in_a_row = skipped + bad, in_a_row + 1 if bad else 0
            if bad:
                found = f"the loss is {loss} at step {step} (gradient norm {record['gradient_norm']})"
                if in_a_row > loop.bad_steps:
                    raise UserError(
                        f"{found}, after {loop.bad_steps} steps like it (train.bad_steps); the last good checkpoint is "
                        f"of step {saved}: lower optimizer.learning_rate"
                    )
                journal.say(f"{found}: weights stay as they are")
            else:
                self.losses["loss"] = loss
            last = step == loop.steps
            if step % loop.log_every == 0 or last:
                record = {"step": step} | record | {"skipped_steps": skipped}
                record["learning_rate"] = learning_rate(step, loop.steps, self.config.optimizer)
                record["tokens_per_second"] = (step - logged) * tokens_per_step / busy
                record["step_seconds"] = busy / (step - logged)
                record |= model_flops_utilisation(record["tokens_per_second"], flops, peak)
                line = f"step {step}/{loop.steps}: loss {loss:.3f}, {record['tokens_per_second']:,.0f} tokens/s"
                if step % loop.validate_every == 0 or last:
                    self.stopwatch.start()
                    record |= self.stage.examine(self.model)
                    self.stopwatch.lap("evaluation")
                    if not math.isfinite(record["validation_loss"]):
                        raise UserError(
                            f"the validation loss is {record['validation_loss']} at step {step}, the last good "
                            f"checkpoint is of step {saved}: lower optimizer.learning_rate"
                        )
                    self.losses["validation_loss"] = record["validation_loss"]
                    line += f", validation loss {record['validation_loss']:.3f}"
                spent = self.stopwatch.read()
                record |= {f"{part}_seconds": spent.get(part, 0.0) / (step - logged) for part in STEP_PARTS + PAUSES}
                busy, skipped, logged = 0.0, 0, step
                journal.record(record)
                journal.say(line)
            # A series of bad steps is waited for: the weights that led to it must not take the place of better ones.
            due |= step % loop.checkpoint_every == 0 or self.updater.stops > 0
            if (due and not bad) or last:
                # Its seconds are in the next record: a record is written before the checkpoint that has its step.
                self.stopwatch.start()
                saved_as = self.checkpoints.save(step, self._state())
                self.stopwatch.lap("checkpoint")
                journal.say(f"saved {saved_as}")
                journal.flush(step)
                saved, due = step, False
            if self.updater.stops and not bad and not last:
                journal.say(f"told to stop: ended after step {step}")
                return None
        return {
            "final_loss": self.losses["loss"],
            "val_loss": self.losses["validation_loss"],
            "steps": loop.steps,
            "tokens": loop.steps * tokens_per_step,
            "resumed_from_step": self.resumed_from,
            "seconds": round(time.monotonic() - began, 1),
            "checkpoint": str(self.checkpoints.complete()[-1]),
        }


def main(stage: Stage, config: StageConfig) -> int:
    """Runs or goes on with a run; returns 0, or 75 (EX_TEMPFAIL) when it was told to stop and has saved.

    Raises UserError naming a setting, a path or the step at which the loss stopped being a number.
    """
    with explained(config.run.dir), joined(config.parallel) as ranks:
        run = Run(stage, config, ranks)
        run.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        start, patience = run.resumed_from, config.run.tracking_patience
        journal = Journal(ranks.first, run.directory, config.run.experiment, asdict(config), start, patience)
        if ranks.first:
            write_whole(run.directory / MODEL_FILE, yaml.safe_dump(asdict(config.model), sort_keys=False))
        origin = f"resuming after step {run.resumed_from}" if run.resumed_from else "from the start"
        journal.say(
            f"{run.parameters:,} parameters, {run.batches.windows:,} windows of {config.train.sequence_length} tokens, "
            f"{ranks.count} ranks on {ranks.device.type}, {origin}"
        )
        try:
            result = run.train(journal)
            if result is None:
                journal.finish("KILLED")
                return STOPPED
            publish(stage, config, run.model, journal, result)
        except BaseException:
            journal.finish("FAILED")
            raise
        journal.finish("FINISHED")
    return 0
