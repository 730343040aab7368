"""What a model is examined with between steps: its loss on validation data, and how large activations get there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ictx.data.loader import Batch
from ictx.model import Transformer
from ictx.model.float16 import by_layer, tracked_amax, warning
from ictx.train.config import LoopConfig
from ictx.train.loss import Counts, Loss
from ictx.train.ranks import Ranks


class Scored(Protocol):
    """What a stage defines for windows of tokens; see `ictx.train.stage`."""

    def counts(self, model: Transformer, batch: Batch) -> Counts:
        """Returns the `tokens` that a loss is a mean over."""

    def loss(self, model: Transformer, batch: Batch, totals: Counts) -> Loss:
        """Returns shares of all that `totals` counts."""


class Validation:
    """Windows spread evenly over the validation data: the same ones each time, and at any number of ranks."""

    def __init__(self, windows: int, read: Callable[[Sequence[int]], Batch], loop: LoopConfig, ranks: Ranks) -> None:
        """Args: `read` returns those of `windows` windows that have these numbers."""
        self.windows, self.read, self.loop, self.ranks = windows, read, loop, ranks

    def examine(self, model: Transformer, stage: Scored) -> dict[str, float]:
        """Returns `validation_loss`, the mean over all tokens, and `activation_amax/LAYER`."""
        # Compiled code has no hooks: what watches magnitudes needs the modules.
        with tracked_amax(model) as amax, torch.compiler.set_stance("force_eager"), torch.no_grad():
            mean = self._mean(model, stage)
        layers = by_layer(amax)
        peaks = dict(zip(layers, self.ranks.largest(*layers.values()), strict=True))
        if unsafe := warning(peaks):
            self.ranks.say(unsafe)
        return {"validation_loss": mean} | {f"activation_amax/{layer}": peak for layer, peak in peaks.items()}

    def _mean(self, model: Transformer, stage: Scored) -> float:
        loop, ranks = self.loop, self.ranks
        count = min(self.windows, loop.validation_windows)
        each = -(-count // ranks.data_count)
        total, tokens = 0.0, 0.0
        for first in range(0, each, loop.batch_size):
            places = range(first, min(first + loop.batch_size, each))
            numbers = [place * ranks.data_count + ranks.data_rank for place in places]
            starts = [number % count * (self.windows // count) for number in numbers]
            batch = self.read(starts)
            # Every rank does the same number of batches: a sharded forward needs all of them. What is left over is done
            # again, and does not count.
            batch.labels[torch.tensor(numbers) >= count] = -1
            batch = batch.part(*ranks.part).to(ranks.device)
            counts = stage.counts(model, batch)
            _, means = stage.loss(model, batch, counts)
            valid = float(counts["tokens"])
            total, tokens = total + float(means["loss"]) * valid, tokens + valid
        total, tokens = ranks.total(total, tokens)
        return total / tokens
