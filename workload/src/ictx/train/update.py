"""One optimizer step: gradients of all ranks, divided by the tokens of all of them, checked, applied."""

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
    """Does the optimizer steps of a run."""

    def __init__(self, state: TrainingState, stopwatch: Stopwatch, watchdog: Watchdog) -> None:
        self.state, self.stopwatch, self.watchdog = state, stopwatch, watchdog
        self.model, self.optimizers, self.ranks = state.model, state.optimizers, state.ranks
        self.config, self.loop = state.config, state.config.train
        self.stops = 0.0
        """How many ranks were signalled to stop, as of the last step."""

    def step(self, number: int) -> dict[str, float]:
        """Does one step, unless its loss or gradient is not finite or a spike: then no weight changes.

        Returns the `loss` of all ranks, the whole gradient's norm, how experts are used, and whether the step was
        `skipped`.
        """
        rate = learning_rate(number, self.loop.steps, self.config.optimizer)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
        means = self._gradients(number)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
        assert isinstance(norm, DTensor)
        record = means | {"gradient_norm": float(norm.full_tensor())}
        # The same numbers on every rank: all of them update their weights, or none does.
        good = self._good(record["loss"], record["gradient_norm"])
        for optimizer in self.optimizers:
            if good:
                optimizer.step()
            optimizer.zero_grad()
        # With an adapter all else stays as it is, the routers' biases too.
        violation = self.model.after_step(good and not self.loop.lora)
        self.stopwatch.lap("optimizer")
        if violation is not None:
            record["expert_max_violation"] = violation.item()
        return record | {"skipped": float(not good)}

    def _good(self, loss: float, norm: float) -> bool:
        """Whether a step is to be done."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return False
        spike = self.state.progress.is_spike(loss, norm, self.loop.skip_spikes)
        self.state.progress.note(loss, norm)
        return not spike

    def _gradients(self, number: int) -> dict[str, float]:
        """Leaves the gradient of the mean loss over all tokens of all ranks, and returns means over them."""
        seed_dropout(self.loop, number, self.ranks.rank)
        self.watchdog.at(number, "data")
        self.stopwatch.start()
        # All batches at once: what their losses are divided by is known before the first backward.
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
        """Adds a batch's gradient to what is there, and returns its shares of what is recorded."""
        self.watchdog.at(number, "forward")
        loss, metrics = self.state.stage.loss(self.model, batch, totals)
        self.stopwatch.lap("forward")
        self.watchdog.at(number, "backward")
        # Sharding divides the sum over ranks by their number.
        (loss * self.ranks.count).backward()  # type: ignore[no-untyped-call]
        self.stopwatch.lap("backward")
        # Nothing here waits for a GPU: the next part is prepared meanwhile.
        return metrics
