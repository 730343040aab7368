"""The interface of a training stage to the loop in `ictx.train.run`: batches, loss, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from ictx.model import Transformer
from ictx.track.lineage import Lineage
from ictx.train.config import StageConfig
from ictx.train.init import Parent
from ictx.train.loss import Counts, Loss
from ictx.train.ranks import Ranks


class Movable(Protocol):
    """A batch."""

    def to(self, device: torch.device) -> Any:
        """Returns a copy on a device."""


class Source(Protocol):
    """This rank's infinite sequence of batches."""

    windows: int
    """Windows per epoch."""
    rows: int
    """Sequences per window: 2 for a pair of answers, else 1."""

    def next(self) -> Movable:
        """Returns this rank's part of the next global batch."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the position: equal on all ranks, and independent of their number."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a position. Raises UserError if the settings do not allow that."""


class Stage(Protocol):
    """A kind of training. Every rank creates one and calls its methods together with the others."""

    name: str
    """Name in the command line and in monitoring."""
    fingerprint: str
    """Fingerprint of the data, to verify that a run resumes with the same data. Set by `batches`."""
    vocabulary: Path
    """Folder with the tokenizer that is exported with the model."""
    end_of_text: str
    """The tokenizer's end-of-text token."""

    @property
    def data_dir(self) -> Path:
        """Folder with the data, for messages."""

    @property
    def parent(self) -> Parent | None:
        """Initial model; None: random weights."""

    @property
    def settings(self) -> type[StageConfig]:
        """Class of its settings."""

    def batches(self, ranks: Ranks) -> Source:
        """Returns the training data. Raises UserError if it does not match the settings."""

    def counts(self, model: Transformer, batch: Any) -> Counts:
        """Returns the denominators of a batch's losses, such as `tokens`; does not compute the loss."""

    def loss(self, model: Transformer, batch: Any, totals: Counts) -> Loss:
        """Returns a batch's share of a step's loss, with gradient, and its shares of the metrics, including `loss`.

        A share is the sum over the batch divided by the denominator over all batches of the step on all ranks, so that
        shares can be added.

        Args:
            totals: sums of `counts` over these batches.
        """

    def examine(self, model: Transformer) -> dict[str, float]:
        """Returns validation metrics, such as `validation_loss`; equal on all ranks and independent of their number."""

    def conclude(self, result: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Returns the stage's additional fields of result.json, and a log line about the result."""


def lineage(stage: Stage) -> Lineage:
    """Returns a stage's lineage; call it after `batches`."""
    parent = stage.parent.registered if stage.parent else ""
    return Lineage(stage.name, parent, str(stage.data_dir.resolve()), stage.fingerprint)
