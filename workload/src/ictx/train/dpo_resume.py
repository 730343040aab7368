"""TRL's trainer with checkpoints of ours: complete or absent, verified, and good for any number of ranks."""

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
    """Trains a run's pairs in its order, from where it stood."""

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
        """Args: `past` is what the newest checkpoint noted, `fingerprint` of what the run trains on."""
        self.ranks, self.checkpoints, self.reports, self.past = ranks, checkpoints, reports, past
        self.fingerprint, self.begun_at = fingerprint, 0
        super().__init__(config, ranks.device, callbacks=[Hooks(reports, ranks, config.train)], **arguments)
        self.remove_callback(PrinterCallback)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """Returns what TRL does, and prints now and then how far it is."""
        found = super().compute_ref_log_probs(model, inputs)
        self.reports.reference(len(inputs["input_ids"]) // 2 * self.ranks.count)
        return found

    def go(self, step: int, count: int, used: list[int], scratch: Path) -> None:
        """Trains from a checkpoint's step, or from the start (0).

        Args:
            count: pairs of an epoch.
            used: which of them the trainer has.
            scratch: an empty folder of this rank's own.
        """
        loop, self.begun_at = self.config.train, step
        self.per_step = loop.accumulate * loop.batch_size * self.ranks.count
        chosen = places(count, loop.seed, self.past["taken"], (loop.steps - step) * self.per_step)
        place = {pair: number for number, pair in enumerate(used)}
        rest = [place[pair] for pair in chosen]
        # transformers passes over the batches of the steps that were done, as many as they are at this number of ranks.
        self.train_dataset = self.train_dataset.select([0] * (step * self.per_step) + rest)
        if step:
            state = TrainerState(global_step=step, train_batch_size=loop.batch_size)
            state.compute_steps(self.args, loop.steps)  # type: ignore[no-untyped-call]
            state.save_to_json(str(scratch / "trainer_state.json"))
        self.train(resume_from_checkpoint=str(scratch) if step else None)
        self.reports.write()

    def snapshot(self) -> dict[str, Any]:
        """Returns what a checkpoint holds; tensors are the ones that are trained."""
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
        """Writes a checkpoint of ours in place of transformers'."""
        step, journal = self.state.global_step, self.reports.journal
        self.reports.write()
        journal.say(f"saved {self.checkpoints.save(step, self.snapshot())}")
        journal.flush(step)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Takes up weights, optimizer and rates, once the model is sharded."""
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
            # Weight decay and the like are those of this start's settings.
            group |= {name: value for name, value in kept.items() if name != "params"}
            group["lr"] = base * rate(self.begun_at)
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _load_from_checkpoint(self, *_: Any) -> None:
        """Weights come with the optimizer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The order of pairs is the run's, and each step seeds what its dropout draws."""

    def result(self, last: Mapping[str, float]) -> dict[str, Any]:
        """Returns what result.json begins with; `last` is the last record."""
        return {
            "final_loss": last["loss"],
            "val_loss": last["validation_loss"],
            "steps": self.state.global_step,
            "tokens": self.past["tokens"] + self._total_train_tokens,
            "skipped_steps": 0,
            "roll_backs": 0,
        }
