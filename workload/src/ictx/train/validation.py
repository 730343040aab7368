"""Evaluation between steps: the loss on validation data, and the largest activations of each layer."""

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
    """The loss of a stage with windows of tokens; see `ictx.train.stage`."""

    def counts(self, model: Transformer, batch: Batch) -> Counts:
        """Returns `tokens`, the denominator of the loss."""

    def loss(self, model: Transformer, batch: Batch, totals: Counts) -> Loss:
        """Returns the batch's share of the loss, with `totals` as the denominators."""


class Validation:
    """Windows spread evenly over the validation data; always the same, independent of the number of ranks."""

    def __init__(self, windows: int, read: Callable[[Sequence[int]], Batch], loop: LoopConfig, ranks: Ranks) -> None:
        """Args: `read` returns the windows with the given indices, of `windows` in total."""
        self.windows, self.read, self.loop, self.ranks = windows, read, loop, ranks

    def examine(self, model: Transformer, stage: Scored) -> dict[str, float]:
        """Returns `validation_loss` (mean over all tokens, in nats) and `activation_amax/LAYER`."""
        # tracked_amax uses module hooks, which compiled code does not call.
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
            # A sharded forward needs all ranks, so every rank computes the same number of batches; surplus windows are
            # repeated and masked.
            batch.labels[torch.tensor(numbers) >= count] = -1
            batch = batch.part(*ranks.part).to(ranks.device)
            counts = stage.counts(model, batch)
            _, means = stage.loss(model, batch, counts)
            valid = float(counts["tokens"])
            total, tokens = total + float(means["loss"]) * valid, tokens + valid
        total, tokens = ranks.total(total, tokens)
        return total / tokens
