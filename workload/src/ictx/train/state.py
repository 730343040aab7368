"""The state of a run in checkpoints: weights, optimizer, position in the data, and progress."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ictx.errors import UserError
from ictx.model import ModelConfig
from ictx.settings import flatten
from ictx.train.checkpoint import MODEL_FILE, Checkpoints
from ictx.train.config import TRAINING_ONLY, StageConfig
from ictx.train.optimizer import new_optimizers
from ictx.train.progress import Progress
from ictx.train.ranks import Ranks, on_first
from ictx.train.sharded import sharded_model
from ictx.train.stage import Stage


class TrainingState:
    """A rank's part of a run's state; every rank creates one."""

    def __init__(self, stage: Stage, config: StageConfig, ranks: Ranks, directory: Path) -> None:
        """Initializes the weights from the seed. Raises UserError for data that does not match the settings."""
        self.stage, self.config, self.ranks, self.directory = stage, config, ranks, directory
        self.batches = stage.batches(ranks)
        self.model = sharded_model(config.model, config.train, ranks)
        self.parameters = sum(weight.numel() for weight in self.model.parameters())
        self.optimizers = new_optimizers(self.model, config.optimizer, ranks.device)
        loop = config.train
        self.tokens_per_step = loop.accumulate * loop.batch_size * ranks.data_count * loop.sequence_length
        self.tokens_per_step *= self.batches.rows
        self.losses = {"loss": math.nan, "validation_loss": math.nan}
        self.progress = Progress()

    def snapshot(self) -> dict[str, Any]:
        """Returns the content of a checkpoint; tensors are references, not copies."""
        model, optimizer = get_state_dict(self.model, self.optimizers)
        return {
            "model": model,
            "optimizer": optimizer,
            "batches": self.batches.state_dict(),
            "losses": dict(self.losses),
            "progress": self.progress.dump(),
            "data": self.stage.fingerprint,
        }

    def resume(self, checkpoints: Checkpoints) -> int:
        """Loads the newest checkpoint, or run.start_from; returns its step, or 0 without one.

        Without a checkpoint, loads the parent's weights if the stage has a parent.

        Raises UserError if the checkpoint does not match the settings.
        """
        state = self.snapshot()
        step = self._load(checkpoints, state)
        if state["data"] != self.stage.fingerprint:
            raise UserError(
                f"{self.origin} was trained on other data than {self.stage.data_dir}: use the data.dir "
                "(or data.mix and data.long_documents) that it was started with, or another run.dir"
            )
        if step > self.config.train.steps:
            raise UserError(
                f"train.steps is {self.config.train.steps}, but {self.origin} has a checkpoint of step {step}: "
                "raise train.steps or use another run.dir"
            )
        if step:
            on_first(self._check_model)
            self.progress.load(state["progress"])
            # Earlier versions did not count tokens; their steps had a constant size.
            self.progress.tokens = self.progress.tokens or step * self.tokens_per_step
            self.batches.load_state_dict(state["batches"])
            self._take(state)
        else:
            # snapshot() created the optimizer's state as if one step was done, which would shift the bias correction.
            for optimizer in self.optimizers:
                optimizer.state.clear()
            if self.stage.parent:
                self.stage.parent.load(self.model)
        return step

    def roll_back(self, checkpoints: Checkpoints) -> int:
        """Loads the newest checkpoint, except the position in the data; returns its step."""
        state, now = self.snapshot(), self.progress
        step = self._load(checkpoints, state)
        self.progress = Progress()
        self.progress.load(state["progress"])
        self.progress.skipped_steps, self.progress.roll_backs = now.skipped_steps, now.roll_backs + 1
        self._take(state)
        return step

    def _load(self, checkpoints: Checkpoints, state: dict[str, Any]) -> int:
        step, start = checkpoints.load_newest(state), self.config.run.start_from
        self.origin = self.directory
        if not step and start:
            step, self.origin = checkpoints.load(start, state), start.resolve().parent.parent
        return step

    def _take(self, state: dict[str, Any]) -> None:
        self.losses = state["losses"]
        # Keep this start's hyperparameters, such as weight decay.
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        settings = [{**group} for group in groups]
        set_state_dict(
            self.model, self.optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, kept in zip(groups, settings, strict=True):
            group |= {name: value for name, value in kept.items() if name != "params"}

    def _check_model(self) -> None:
        """Raises UserError if model settings differ from the checkpoint's, except those that affect only training."""
        path = self.origin / MODEL_FILE
        if not path.exists():
            return
        before, now = (flatten(asdict(config)) for config in (ModelConfig.from_yaml(path), self.config.model))
        for name in sorted({*before, *now} - TRAINING_ONLY):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"model.{name} is {now.get(name)}, but {self.origin} was started with {before.get(name)}: "
                    f"use --set model.{name}={before.get(name)}, or another run.dir"
                )
