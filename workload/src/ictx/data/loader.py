"""Documents packed to sequences, shuffled and shared out among ranks; where it stands is one number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ictx.data.shards import TokenArray
from ictx.errors import UserError

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Packed sequences of one rank, all int64 of shape (batch, sequence)."""

    input_ids: Tensor
    labels: Tensor
    """Each input's next token; after a document's end that is the first of the next document."""
    position_ids: Tensor
    """Place in the document, or in the part of it that is in the sequence."""
    document_ids: Tensor
    """0, 1, … along a sequence: attention that stays within documents compares them. All 0 when it need not."""


def shuffled(count: int, *seeds: int) -> Integers:
    """Returns a permutation of range(count) that the seeds fix, on every machine and for every version of NumPy.

    It sorts by SplitMix64 (Steele et al., 2014, figure 15) of the numbers; equal keys stay in order.
    """

    def mixed(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.zeros(1, np.uint64)
    for seed in seeds:
        state = mixed((state ^ np.uint64(seed & (1 << 64) - 1)) + golden)
    keys = mixed(state + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * golden)
    return np.argsort(keys, kind="stable").astype(np.int64)


class Stream:
    """The tokens of all documents, epoch after epoch without an end.

    An epoch holds every document once: shards in an order of their own, within each all documents in an order of their
    own. Seed and epoch fix both. Only the index of the shards that are being read is in memory.
    """

    def __init__(self, data: TokenArray, seed: int) -> None:
        """Starts the first epoch."""
        self.data, self.seed, self.length = data, seed, len(data)
        self._orders: dict[tuple[int, ...], tuple[Integers, Integers]] = {}

    def read(self, position: int, count: int) -> tuple[Integers, Integers]:
        """Returns tokens [position, position + count), and how many of them are of each document they are from."""
        tokens, lengths = np.empty(count, np.int64), []
        filled = 0
        while filled < count:
            epoch, place = divmod(position + filled, self.length)
            shards, ends = self._order(epoch)
            at = int(np.searchsorted(ends, place, "right"))
            shard = self.data.shards[shards[at]]
            place -= int(ends[at - 1]) if at else 0
            documents, ends = self._order(epoch, int(shards[at]))
            first = int(np.searchsorted(ends, place, "right"))
            for number in range(first, len(documents)):
                document = int(documents[number])
                stop = int(shard.ends[document])
                start = stop - int(ends[number] - place)
                taken = min(stop - start, count - filled)
                tokens[filled : filled + taken] = shard.tokens[start : start + taken]
                lengths.append(taken)
                filled, place = filled + taken, place + taken
                if filled == count:
                    break
        return tokens, np.array(lengths, np.int64)

    def _order(self, epoch: int, *shard: int) -> tuple[Integers, Integers]:
        """Returns the shards of an epoch in its order, or the documents of one, and where each of them ends in it."""
        key = (epoch, *shard)
        if key not in self._orders:
            if shard:
                sizes = np.diff(self.data.shards[shard[0]].ends, prepend=0)
            else:
                sizes = np.array([len(each.tokens) for each in self.data.shards], np.int64)
            # A window may lie on the border of two epochs, and so of two shards.
            while len(self._orders) >= 4:
                self._orders.pop(next(iter(self._orders)))
            order = shuffled(len(sizes), self.seed, *key)
            self._orders[key] = (order, np.cumsum(sizes[order]))
        return self._orders[key]


class Batches:
    """Endless training batches: every token is an input once an epoch.

    A step takes the next tokens of the stream whatever the number of ranks: each rank a part of its own. So training
    goes on after a resume on more or fewer nodes, with batches or sequences of another size too, and nothing is lost or
    repeated. The place in the stream is all that a checkpoint keeps.
    """

    def __init__(
        self, data: TokenArray, length: int, batch: int, rank: int, ranks: int, seed: int, mask_documents: bool = False
    ) -> None:
        """Args: `batch` is a rank's; raises UserError when the data has too few windows for one global batch."""
        self.length, self.batch, self.rank, self.ranks = length, batch, rank, ranks
        self.mask_documents = mask_documents
        self.stream = Stream(data, seed)
        self.position = 0
        self.windows = data.windows(length)
        if self.windows < batch * ranks:
            raise UserError(
                f"the training data has {self.windows} windows of {length} tokens, but a global batch takes "
                f"{batch * ranks}: prepare a larger corpus or lower train.batch_size"
            )

    @property
    def epoch(self) -> int:
        """The epoch that the next batch begins in."""
        return self.position // self.stream.length

    def next(self) -> Batch:
        """Returns this rank's part of the next global batch."""
        first = self.position + self.rank * self.batch * self.length
        self.position += self.ranks * self.batch * self.length
        rows = [self._row(first + number * self.length) for number in range(self.batch)]
        return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))

    def _row(self, position: int) -> tuple[Integers, Integers, Integers, Integers]:
        """Returns the sequence that begins at a place of the stream."""
        tokens, lengths = self.stream.read(position, self.length + 1)
        numbers = np.repeat(np.arange(len(lengths)), lengths)[:-1]
        starts = np.repeat(np.cumsum(lengths) - lengths, lengths)[:-1]
        documents = numbers if self.mask_documents else np.zeros_like(numbers)
        return tokens[:-1], tokens[1:], np.arange(self.length) - starts, documents

    def state_dict(self) -> dict[str, int]:
        """Returns where the stream stands."""
        return {"position": self.position, "seed": self.stream.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where the stream stood. Raises UserError when its order was another one."""
        if state["seed"] != self.stream.seed:
            raise UserError(
                f"train.seed is {self.stream.seed}, but the checkpoint's data has the order of {state['seed']}"
            )
        self.position = state["position"]
