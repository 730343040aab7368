"""Converts TRL's logs to ictx's records."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback

from ictx.errors import UserError
from ictx.track.journal import Journal
from ictx.train.config import LoopConfig
from ictx.train.dpo_stage import MARGIN, PAUSE
from ictx.train.lora import seed_dropout
from ictx.train.ranks import Ranks
from ictx.train.run import peak_memory

NAMES = {"grad_norm": "gradient_norm"}
"""TRL's names that differ from ours; `eval_…` becomes `validation_…`."""
TAKEN = ("loss", "learning_rate", "grad_norm", "entropy", "rewards/", "logps/")
"""Prefixes of the metrics to record."""


class Reports:
    """Collects TRL's logs and writes records."""

    def __init__(self, journal: Journal, ranks: Ranks, steps: int) -> None:
        """Args: `steps` is the run's total number of steps."""
        self.journal, self.ranks, self.steps = journal, ranks, steps
        self.waiting: dict[str, float] = {}
        self.busy, self.began, self.done = 0.0, 0.0, 0
        self.counted = self.referred = 0
        self.logged = time.monotonic()

    def reference(self, pairs: int) -> None:
        """Counts pairs that the reference model has scored; logs the number every PAUSE seconds."""
        self.referred += pairs
        if time.monotonic() - self.logged > PAUSE:
            self.logged = time.monotonic()
            self.journal.say(f"log-probabilities of the reference model: {self.referred:,} pairs")

    def begin(self) -> None:
        """Starts a step; writes the record of the previous one, which is complete."""
        self.write()
        self.began = time.monotonic()

    def end(self) -> None:
        """Ends a step."""
        self.busy, self.done = self.busy + time.monotonic() - self.began, self.done + 1

    def log(self, step: int, logs: dict[str, Any]) -> None:
        """Receives TRL's logs of a step. Raises UserError if the loss is not finite."""
        validation = "eval_loss" in logs
        if not validation and "loss" not in logs:
            return  # TRL's summary at the end of the training
        prefix, found = "validation_" if validation else "", dict[str, float]()
        for name, value in logs.items():
            bare = name.removeprefix("eval_")
            if bare.startswith(TAKEN):
                found[prefix + NAMES.get(bare, bare)] = float(value)
        loss = found["validation_loss" if validation else "loss"]
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step}: lower optimizer.learning_rate; the next start resumes "
                            "from the last checkpoint")  # fmt: skip
        if not validation:
            tokens = int(logs["num_tokens"])
            found["tokens_per_second"] = (tokens - self.counted) / self.busy
            found["step_seconds"] = self.busy / self.done
            self.busy, self.done, self.counted = 0.0, 0, tokens
        self.waiting |= {"step": step} | found

    def write(self) -> None:
        """Writes the pending record, if any; every rank calls it."""
        if not self.waiting:
            return
        record, self.waiting = self.waiting, {}
        (record["peak_memory_bytes"],) = self.ranks.largest(peak_memory(self.ranks.device))
        self.journal.record(record)
        shown = {"loss": ".3f", "tokens_per_second": ",.0f", "rewards/margins": ".3f", "validation_loss": ".3f"}
        shown[MARGIN] = ".3f"
        line = ", ".join(f"{name} {record[name]:{form}}" for name, form in shown.items() if name in record)
        self.journal.say(f"step {int(record['step'])}/{self.steps}: {line}")


class Hooks(TrainerCallback):
    """Triggers records, and stops the training with a checkpoint if a rank is signalled to stop."""

    def __init__(self, reports: Reports, ranks: Ranks, loop: LoopConfig) -> None:
        self.reports, self.ranks, self.loop = reports, ranks, loop

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called before an optimizer step."""
        self.reports.begin()
        seed_dropout(self.loop, state.global_step + 1, self.ranks.rank)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called after an optimizer step."""
        self.reports.end()
        if state.global_step == state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True
        elif self.ranks.total(float(self.ranks.told_to_stop))[0]:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Called with metrics of training or validation."""
        self.reports.log(state.global_step, logs or {})
