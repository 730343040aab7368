"""One optimizer step: gradients of all ranks, divided by the tokens of all of them, checked, applied."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ictx.model import Transformer
from ictx.train.config import StageConfig
from ictx.train.optimizer import learning_rate
from ictx.train.ranks import Ranks
from ictx.train.stage import Source, Stage
from ictx.train.stopwatch import Stopwatch


class Updater:
    """Does the optimizer steps of a run."""

    def __init__(
        self,
        stage: Stage,
        config: StageConfig,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        batches: Source,
        ranks: Ranks,
        stopwatch: Stopwatch,
    ) -> None:
        self.stage, self.loop, self.rate = stage, config.train, config.optimizer
        self.model, self.optimizer, self.batches = model, optimizer, batches
        self.ranks, self.stopwatch = ranks, stopwatch
        self.stops = 0.0
        """How many ranks were told to stop, as of the last step."""

    def step(self, number: int) -> dict[str, float]:
        """Does one step, unless the loss or the gradient is not finite: then nothing changes.

        Returns the `loss` of all ranks, the whole gradient's norm, how experts are used, and whether the step was
        `skipped`.
        """
        rate = learning_rate(number, self.loop.steps, self.rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        means = self._gradients()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.rate.clip_norm)
        assert isinstance(norm, DTensor)
        record = means | {"gradient_norm": float(norm.full_tensor())}
        # The same numbers on every rank: all of them update their weights, or none does.
        good = math.isfinite(record["loss"]) and math.isfinite(record["gradient_norm"])
        if good:
            self.optimizer.step()
        self.optimizer.zero_grad()
        violation = self.model.after_step(good)
        self.stopwatch.lap("optimizer")
        if violation is not None:
            record["expert_max_violation"] = violation.item()
        return record | {"skipped": float(not good)}

    def _gradients(self) -> dict[str, float]:
        """Leaves the gradient of the mean loss over all tokens of all ranks, and returns means over them."""
        self.stopwatch.start()
        batch = self.batches.next().to(self.ranks.device)
        self.stopwatch.lap("data")
        total, count, sums = self.stage.loss(self.model, batch)
        self.stopwatch.lap("forward")
        total.backward()  # type: ignore[no-untyped-call]
        self.stopwatch.lap("backward")
        told = float(self.ranks.told_to_stop)
        self.stops, tokens, *totals = self.ranks.total(told, float(count), *map(float, sums.values()))
        self.stopwatch.lap("ranks")
        # Sharding has divided the sum of all ranks by their number.
        scale = self.ranks.count / max(tokens, 1)
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        torch._foreach_mul_([grad.to_local() if isinstance(grad, DTensor) else grad for grad in gradients], scale)
        return dict(zip(sums, (value / max(tokens, 1) for value in totals), strict=True))
