"""An optimizer step: gradients normalized over all ranks' tokens, checked, and applied."""

from __future__ import annotations

import math
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ictx.stopwatch import Stopwatch
from ictx.train.lora import seed_dropout
from ictx.train.loss import Counts
from ictx.train.optimizer import learning_rate
from ictx.train.state import TrainingState
from ictx.train.watchdog import Watchdog


class Updater:
    """Runs the optimizer steps of a run."""

    def __init__(self, state: TrainingState, stopwatch: Stopwatch, watchdog: Watchdog) -> None:
        self.state, self.stopwatch, self.watchdog = state, stopwatch, watchdog
        self.model, self.optimizers, self.ranks = state.model, state.optimizers, state.ranks
        self.config, self.loop = state.config, state.config.train
        self.stops = 0.0
        """Number of ranks that had been signalled to stop at the last step."""

    def step(self, number: int) -> dict[str, float]:
        """Runs one step; skips the update if loss or gradient is not finite or a spike.

        Returns the `loss` over all ranks, `gradient_norm` before clipping, metrics of the experts' load, and `skipped`
        (0 or 1).
        """
        rate = learning_rate(number, self.loop.steps, self.config.optimizer)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        means = self._gradients(number)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
        assert isinstance(norm, DTensor)
        record = means | {"gradient_norm": float(norm.full_tensor())}
        # The numbers are equal on all ranks, so that either all or none update their weights.
        good = self._good(record["loss"], record["gradient_norm"])
        for optimizer in self.optimizers:
            if good:
                optimizer.step()
            optimizer.zero_grad()
        # With an adapter, all other parameters are frozen, including the routers' biases.
        violation = self.model.after_step(good and not self.loop.lora)
        self.stopwatch.lap("optimizer")
        if violation is not None:
            record["expert_max_violation"] = violation.item()
        return record | {"skipped": float(not good)}

    def _good(self, loss: float, norm: float) -> bool:
        """Whether to apply a step; updates the recent steps."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        spike = self.state.progress.is_spike(loss, norm, self.loop.skip_spikes)
        self.state.progress.note(loss, norm)
        return not spike

    def _gradients(self, number: int) -> dict[str, float]:
        """Accumulates the gradient of the mean loss over all ranks' tokens; returns the means of the metrics."""
        seed_dropout(self.loop, number, self.ranks.rank)
        self.watchdog.at(number, "data")
        self.stopwatch.start()
        # Reads all batches first, because the denominators of their losses are needed before the first backward.
        batches = [self.state.batches.next().to(self.ranks.device) for _ in range(self.loop.accumulate)]
        self.stopwatch.lap("data")
        self.watchdog.at(number, "ranks")
        totals = self.ranks.sums([self.state.stage.counts(self.model, batch) for batch in batches])
        self.stopwatch.lap("ranks")
        means: dict[str, Tensor] = {}
        for turn, batch in enumerate(batches, 1):
            cast("FSDPModule", self.model).set_requires_gradient_sync(
                turn == self.loop.accumulate or not self.loop.reduce_once
            )
            for name, share in self._backward(number, batch, totals).items():
                means[name] = means[name] + share if name in means else share
        self.watchdog.at(number, "ranks")
        self.stops, *found = self.ranks.total(float(self.ranks.told_to_stop), *map(float, means.values()))
        self.stopwatch.lap("ranks")
        return dict(zip(means, found, strict=True))

    def _backward(self, number: int, batch: Any, totals: Counts) -> dict[str, Tensor]:
        """Accumulates a batch's gradient; returns its shares of the metrics."""
        self.watchdog.at(number, "forward")
        loss, metrics = self.state.stage.loss(self.model, batch, totals)
        self.stopwatch.lap("forward")
        self.watchdog.at(number, "backward")
        # FSDP averages gradients over ranks: undo its division.
        (loss * self.ranks.count).backward()  # type: ignore[no-untyped-call]
        self.stopwatch.lap("backward")
        # Must not synchronize with the GPU, so that the CPU can prepare the next batch meanwhile.
        return metrics
