"""Training batches: documents packed into sequences, shuffled and divided among ranks; the position is one number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ictx.data.mix import Mix, MixedStream
from ictx.data.shards import TokenArray
from ictx.data.stream import Integers, Stream
from ictx.errors import UserError


@dataclass(frozen=True)
class Batch:
    """Packed sequences of one rank; all tensors are int64 (batch, sequence)."""

    input_ids: Tensor
    labels: Tensor
    """Each input's next token; after the end of a document, the first token of the next one."""
    position_ids: Tensor
    """Position in the document, or in the part of it that is in the sequence."""
    document_ids: Tensor
    """Index of the document in the sequence (0, 1, …), for attention within documents."""

    @classmethod
    def of(cls, windows: Sequence[tuple[Integers, Integers]]) -> Batch:
        """Returns a batch of windows, each given as its tokens and the lengths of its documents' parts."""
        rows = []
        for tokens, lengths in windows:
            numbers = np.repeat(np.arange(len(lengths)), lengths)[:-1]
            starts = np.repeat(np.cumsum(lengths) - lengths, lengths)[:-1]
            rows.append((tokens[:-1], tokens[1:], np.arange(len(numbers)) - starts, numbers))
        return cls(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))

    def to(self, device: torch.device) -> Batch:
        """Returns the batch on a device."""
        return self._each(lambda x_bs: x_bs.to(device))

    def part(self, place: int, parts: int) -> Batch:
        """Returns one of `parts` equal parts of each sequence; positions and documents are those of the whole."""
        return self._each(lambda x_bs: x_bs.view(len(x_bs), parts, -1)[:, place])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*(change(getattr(self, field.name)) for field in fields(self)))


class Batches:
    """Endless training batches: every token is an input once per epoch of its corpus.

    A step takes the next windows of the stream and divides them among the ranks. Training can therefore resume on more
    or fewer nodes, or with another batch size, without losing or repeating data. A checkpoint needs only the number of
    windows taken.
    """

    rows = 1
    """Sequences per window."""

    def __init__(
        self,
        data: TokenArray | Mix,
        length: int,
        batch: int,
        rank: int,
        ranks: int,
        seed: int,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """Raises UserError if the data has too few windows for one global batch.

        Args:
            batch: windows per rank.
            part: index and number of parts of a window's tokens: ranks that divide windows (context parallelism) are
                one rank here, with several parts.
        """
        self.batch, self.rank, self.ranks, self.part = batch, rank, ranks, part
        self.stream: Stream | MixedStream
        self.stream = data.stream(length, seed) if isinstance(data, Mix) else Stream(data, length, seed)
        self.taken = 0
        self.windows = self.stream.windows
        if self.windows < batch * ranks:
            raise UserError(
                f"the training data has {self.windows} windows of {length} tokens, but a global batch takes "
                f"{batch * ranks}: prepare a larger corpus or lower train.batch_size"
            )

    def next(self) -> Batch:
        """Returns this rank's part of the next global batch."""
        first = self.taken + self.rank * self.batch
        self.taken += self.ranks * self.batch
        return Batch.of([self.stream.window(first + number) for number in range(self.batch)]).part(*self.part)

    def state_dict(self) -> dict[str, int]:
        """Returns the position in the stream, and the settings that determine its order."""
        return {"taken": self.taken, "length": self.stream.length, "seed": self.stream.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at a position. Raises UserError if the order differs."""
        for name, setting in {"length": "train.sequence_length", "seed": "train.seed"}.items():
            value = getattr(self.stream, name)
            if state[name] != value:
                raise UserError(f"{setting} is {value}, but the checkpoint's data has the order of {state[name]}")
        self.taken = state["taken"]
