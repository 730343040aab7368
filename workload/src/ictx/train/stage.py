"""What a stage of training is to the loop in `ictx.train.run`: batches, a loss, an examination."""

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
    """What a forward and backward are done with."""

    def to(self, device: torch.device) -> Any:
        """Returns it on a device."""


class Source(Protocol):
    """This rank's batches, without an end."""

    windows: int
    """Windows of an epoch."""
    rows: int
    """Sequences of a window: two where it is a pair of answers."""

    def next(self) -> Movable:
        """Returns this rank's part of the next batch of all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """Returns where the source stands: the same on every rank, and at any number of ranks."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on there. Raises UserError when the settings do not allow that."""


class Stage(Protocol):
    """A kind of training. Every rank makes one and calls its methods together with the others."""

    name: str
    """What the command line and monitoring call it."""
    fingerprint: str
    """Of its data: a run goes on with the data that it began with. Known when there are batches."""
    vocabulary: Path
    """Folder with the tokenizer that is exported with the model."""
    end_of_text: str
    """The tokenizer's entry that ends a text."""

    @property
    def data_dir(self) -> Path:
        """Folder with its data, for messages."""

    @property
    def parent(self) -> Parent | None:
        """Whose weights it begins with; none: random ones."""

    @property
    def settings(self) -> type[StageConfig]:
        """The settings that it is made of."""

    def batches(self, ranks: Ranks) -> Source:
        """Returns the training data. Raises UserError for data that does not fit the settings."""

    def counts(self, model: Transformer, batch: Any) -> Counts:
        """Returns how many of what the parts of a batch's loss are means over, such as `tokens`: known before it is."""

    def loss(self, model: Transformer, batch: Any, totals: Counts) -> Loss:
        """Returns a batch's share of a step's loss, to differentiate, and of what is recorded, `loss` among it.

        Shares add up: each is a sum over the batch, divided by its count in all batches of the step on all ranks.

        Args:
            totals: sums of `counts` over these batches.
        """

    def examine(self, model: Transformer) -> dict[str, float]:
        """Returns measures of the model, the same on every rank and at any number of ranks: `validation_loss`, ...."""

    def conclude(self, result: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Returns what result.json holds besides what all stages do, and a line about the result."""


def lineage(stage: Stage) -> Lineage:
    """Returns where a stage's model comes from; there must be batches."""
    parent = stage.parent.registered if stage.parent else ""
    return Lineage(stage.name, parent, str(stage.data_dir.resolve()), stage.fingerprint)
