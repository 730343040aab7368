"""What a run consists of, as checkpoints hold it: weights, optimizer, place in the data, and how far it has come."""

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
    """Made by every rank, of its shards."""

    def __init__(self, stage: Stage, config: StageConfig, ranks: Ranks, directory: Path) -> None:
        """Begins with the seed's weights. Raises UserError for data that does not fit the settings."""
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
        """Returns what a checkpoint holds; tensors are the ones that are trained."""
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
        """Takes up the newest checkpoint, or the one to start from, and returns its step, or else 0.

        Without any the weights become the parent's, if the stage has one.

        Raises UserError for one of other settings.
        """
        state = self.snapshot()
        step = self._load(checkpoints, state)
        if state["data"] != self.stage.fingerprint:
            raise UserError(
                f"{self.origin} was trained on other data than {self.stage.data_dir} holds: give the data.dir "
                "(or data.mix and data.long_documents) that it began with, or another run.dir"
            )
        if step > self.config.train.steps:
            raise UserError(
                f"train.steps is {self.config.train.steps}, but {self.origin} has a checkpoint of step {step}: "
                "raise train.steps or give another run.dir"
            )
        if step:
            on_first(self._check_model)
            self.progress.load(state["progress"])
            # Versions that did not count had steps of one size.
            self.progress.tokens = self.progress.tokens or step * self.tokens_per_step
            self.batches.load_state_dict(state["batches"])
            self._take(state)
        else:
            # Looking at its state made it, as if a step had been done: corrections of biases would be of the second.
            for optimizer in self.optimizers:
                optimizer.state.clear()
            if self.stage.parent:
                self.stage.parent.load(self.model)
        return step

    def roll_back(self, checkpoints: Checkpoints) -> int:
        """Takes up the newest checkpoint again, but for the place in the data, and returns its step."""
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
        # Weight decay and the like are those of this start's settings.
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        settings = [{**group} for group in groups]
        set_state_dict(
            self.model, self.optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, kept in zip(groups, settings, strict=True):
            group |= {name: value for name, value in kept.items() if name != "params"}

    def _check_model(self) -> None:
        """Raises UserError when the checkpoint's weights would be another function than they were."""
        path = self.origin / MODEL_FILE
        if not path.exists():
            return
        before, now = (flatten(asdict(config)) for config in (ModelConfig.from_yaml(path), self.config.model))
        for name in sorted({*before, *now} - TRAINING_ONLY):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"model.{name} is {now.get(name)}, but {self.origin} began with {before.get(name)}: go on with "
                    f"--set model.{name}={before.get(name)}, or give another run.dir"
                )
