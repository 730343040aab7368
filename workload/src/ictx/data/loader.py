"""Windows of tokens, shuffled and shared out among ranks; where it stands is one number."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ictx.data.prepare import META_FILE
from ictx.errors import UserError


@dataclass(frozen=True)
class TokenArray:
    """A prepared split, memory-mapped."""

    tokens: npt.NDArray[Any]
    meta: dict[str, Any]

    @classmethod
    def open(cls, directory: Path, split: Literal["train", "validation"]) -> TokenArray:
        """Maps the split of a prepared folder. Raises UserError when it is missing or has lost its end."""
        try:
            meta = json.loads((directory / META_FILE).read_text())
            tokens = np.memmap(directory / f"{split}.bin", np.dtype(meta["dtype"]), "r")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{directory} holds no prepared data ({error}): run `ictx data prepare`") from error
        if len(tokens) != meta[f"{split}_tokens"]:
            raise UserError(
                f"{directory / f'{split}.bin'} has {len(tokens):,} tokens, but {META_FILE} says "
                f"{meta[f'{split}_tokens']:,}: remove the folder and prepare it again"
            )
        return cls(tokens, meta)

    def windows(self, length: int) -> int:
        """Returns how many windows of `length` inputs and their next tokens there are."""
        return (len(self.tokens) - 1) // length

    def window(self, index: int, length: int) -> Tensor:
        """Returns window `index` as int64 of shape (length + 1,): inputs, and one more for the targets."""
        start = index * length
        return torch.from_numpy(self.tokens[start : start + length + 1].astype(np.int64))


class Batches:
    """Endless training batches: every window once an epoch, in an order that seed and epoch fix.

    A global batch is the same for any number of ranks that divides it, so training goes on after a resume on more or
    fewer nodes. `step` is all that a checkpoint keeps.
    """

    def __init__(self, data: TokenArray, length: int, batch: int, rank: int, ranks: int, seed: int) -> None:
        """Args: `batch` is a rank's; raises UserError when the data has too few windows for one global batch."""
        self.data, self.length, self.batch, self.rank, self.ranks, self.seed = data, length, batch, rank, ranks, seed
        self.step = 0
        self.windows = data.windows(length)
        if self.windows < batch * ranks:
            raise UserError(
                f"the training data has {self.windows} windows of {length} tokens, but a global batch takes "
                f"{batch * ranks}: prepare a larger corpus or lower train.batch_size"
            )
        self._order: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def _window_at(self, position: int) -> int:
        """Returns the window at a place of the endless sequence."""
        epoch, place = divmod(position, self.windows)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.windows))
        return int(self._order[1][place])

    def next(self) -> Tensor:
        """Returns this rank's part of the next global batch, int64 of shape (batch, length + 1)."""
        first = (self.step * self.ranks + self.rank) * self.batch
        self.step += 1
        places = range(first, first + self.batch)
        return torch.stack([self.data.window(self._window_at(place), self.length) for place in places])

    def state_dict(self) -> dict[str, int]:
        """Returns where the sequence stands."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where the sequence stood."""
        self.step = state["step"]
