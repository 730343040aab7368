"""TRL's trainer with ictx's checkpoints: atomic, verified, and independent of the number of ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from transformers import PrinterCallback, TrainerState

from ictx.train.checkpoint import Checkpoints
from ictx.train.dpo_config import DpoConfig
from ictx.train.dpo_pairs import places
from ictx.train.dpo_reports import Hooks, Reports
from ictx.train.dpo_trainer import PairTrainer
from ictx.train.ranks import Ranks

TRAINED = StateDictOptions(ignore_frozen_params=True)


class RunTrainer(PairTrainer):
    """Trains a run's pairs in its order, from the last position."""

    def __init__(
        self,
        config: DpoConfig,
        ranks: Ranks,
        checkpoints: Checkpoints,
        reports: Reports,
        past: dict[str, Any],
        fingerprint: str,
        **arguments: Any,
    ) -> None:
        """Args: `past` is the newest checkpoint's progress; `fingerprint` identifies the run's data."""
        self.ranks, self.checkpoints, self.reports, self.past = ranks, checkpoints, reports, past
        self.fingerprint, self.begun_at = fingerprint, 0
        super().__init__(config, ranks.device, callbacks=[Hooks(reports, ranks, config.train)], **arguments)
        self.remove_callback(PrinterCallback)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """Returns TRL's log-probabilities; logs progress."""
        found = super().compute_ref_log_probs(model, inputs)
        self.reports.reference(len(inputs["input_ids"]) // 2 * self.ranks.count)
        return found

    def go(self, step: int, count: int, used: list[int], scratch: Path) -> None:
        """Trains from a checkpoint's step, or from step 0.

        Args:
            count: pairs per epoch.
            used: indices of the pairs in the trainer's data set.
            scratch: an empty folder for this rank only.
        """
        loop, self.begun_at = self.config.train, step
        self.per_step = loop.accumulate * loop.batch_size * self.ranks.count
        chosen = places(count, loop.seed, self.past["taken"], (loop.steps - step) * self.per_step)
        place = {pair: number for number, pair in enumerate(used)}
        rest = [place[pair] for pair in chosen]
        # transformers skips the batches of completed steps at this number of ranks: put placeholders in their place.
        self.train_dataset = self.train_dataset.select([0] * (step * self.per_step) + rest)
        if step:
            state = TrainerState(global_step=step, train_batch_size=loop.batch_size)
            state.compute_steps(self.args, loop.steps)  # type: ignore[no-untyped-call]
            state.save_to_json(str(scratch / "trainer_state.json"))
        self.train(resume_from_checkpoint=str(scratch) if step else None)
        self.reports.write()

    def snapshot(self) -> dict[str, Any]:
        """Returns the content of a checkpoint; tensors are references, not copies."""
        model, optimizer = get_state_dict(self.model, self.optimizer.optimizer, options=TRAINED)
        steps = self.state.global_step - self.begun_at
        progress = {
            "taken": self.past["taken"] + steps * self.per_step,
            "tokens": self.past["tokens"] + self._total_train_tokens,
        }
        return {
            "model": model,
            "optimizer": optimizer,
            "trainer": json.dumps(progress),
            "data": self.fingerprint,
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes an ictx checkpoint instead of transformers'."""
        step, journal = self.state.global_step, self.reports.journal
        self.reports.write()
        journal.say(f"saved {self.checkpoints.save(step, self.snapshot())}")
        journal.flush(step)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads weights, optimizer and learning rates after the model is sharded."""
        if checkpoint is None:
            return
        state = self.snapshot()
        settings = [{**group} for group in self.optimizer.param_groups]
        self.checkpoints.load(self.checkpoints.complete()[-1], state)
        set_state_dict(
            self.model, self.optimizer.optimizer, model_state_dict=state["model"],
            optim_state_dict=state["optimizer"], options=StateDictOptions(strict=False),
        )  # fmt: skip
        scheduler = self.lr_scheduler
        scheduler.last_epoch = self.begun_at
        for group, kept, base, rate in zip(
            self.optimizer.param_groups, settings, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
        ):
            # Keep this start's hyperparameters, such as weight decay.
            group |= {name: value for name, value in kept.items() if name != "params"}
            group["lr"] = base * rate(self.begun_at)
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_from_checkpoint(self, *_: Any) -> None:
        """Does nothing: weights are loaded with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Does nothing: the order of pairs is the run's, and dropout is seeded in each step."""

    def result(self, last: Mapping[str, float]) -> dict[str, Any]:
        """Returns the first fields of result.json; `last` is the last record."""
        return {
            "final_loss": last["loss"],
            "val_loss": last["validation_loss"],
            "steps": self.state.global_step,
            "tokens": self.past["tokens"] + self._total_train_tokens,
            "skipped_steps": 0,
            "roll_backs": 0,
        }
