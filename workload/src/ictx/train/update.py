"""One optimizer step: gradients of all ranks, divided by the tokens of all of them, checked, applied."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ictx.train.optimizer import learning_rate
from ictx.train.state import TrainingState
from ictx.train.stopwatch import Stopwatch
from ictx.train.watchdog import Watchdog


class Updater:
    """Does the optimizer steps of a run."""

    def __init__(self, state: TrainingState, stopwatch: Stopwatch, watchdog: Watchdog) -> None:
        self.state, self.stopwatch, self.watchdog = state, stopwatch, watchdog
        self.model, self.optimizers, self.ranks = state.model, state.optimizers, state.ranks
        self.config, self.loop = state.config, state.config.train
        self.stops = 0.0
        """How many ranks were told to stop, as of the last step."""

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
        violation = self.model.after_step(good)
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
        sums: dict[str, Tensor] = {}
        for turn in range(1, self.loop.accumulate + 1):
            cast("FSDPModule", self.model).set_requires_gradient_sync(
                turn == self.loop.accumulate or not self.loop.reduce_once
            )
            for name, value in self._backward(number).items():
                sums[name] = sums[name] + value if name in sums else value
        self.watchdog.at(number, "ranks")
        self.stops, tokens, *totals = self.ranks.total(float(self.ranks.told_to_stop), *map(float, sums.values()))
        self.stopwatch.lap("ranks")
        # Sharding has divided the sum of all ranks by their number.
        scale = self.ranks.count / max(tokens, 1)
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        torch._foreach_mul_([grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients], scale)
        return {name: total / max(tokens, 1) for name, total in zip(list(sums)[1:], totals, strict=True)}

    def _backward(self, number: int) -> dict[str, Tensor]:
        """Adds a batch's gradient to what is there, and returns its tokens and its sums over them."""
        self.watchdog.at(number, "data")
        self.stopwatch.start()
        batch = self.state.batches.next().to(self.ranks.device)
        self.stopwatch.lap("data")
        self.watchdog.at(number, "forward")
        total, count, sums = self.state.stage.loss(self.model, batch)
        self.stopwatch.lap("forward")
        self.watchdog.at(number, "backward")
        total.backward()  # type: ignore[no-untyped-call]
        self.stopwatch.lap("backward")
        # Nothing here waits for a GPU: the next batch is prepared meanwhile.
        return {"tokens": count} | {name: value.double() for name, value in sums.items()}
