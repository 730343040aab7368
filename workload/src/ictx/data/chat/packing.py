"""Whole conversations packed into windows, shuffled and divided among ranks; the position is one number."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ictx.data.chat.tokens import Conversations, numbers
from ictx.data.loader import Batch
from ictx.data.stream import Integers, shuffled
from ictx.errors import UserError

ALIGNED = 64
"""Windows that are not packed are as long as the longest conversation of a batch, rounded up to a multiple of this."""
# Separates the order of windows from that of conversations under the same seed.
WINDOWS = 0x736674


def best_fit(sizes: Iterable[int], capacity: int) -> list[int]:
    """Returns the bin of each size, counted from 0: the fullest one that it fits into (best fit).

    For decreasing sizes, it needs about 11/9 of the minimum number of bins at most (Johnson et al., 1974).
    Sizes must be at most `capacity`.
    """
    bins: list[int] = []
    with_room: dict[int, list[int]] = defaultdict(list)
    # Bit `r` is set if a bin has exactly `r` free; bit `capacity` is always set, for a new bin.
    rooms, count = 1 << capacity, 0
    for size in sizes:
        fitting = rooms >> size
        room = size + (fitting & -fitting).bit_length() - 1
        if with_room[room]:
            chosen = with_room[room].pop()
        else:
            chosen, count = count, count + 1
        if not with_room[room] and room != capacity:
            rooms &= ~(1 << room)
        if room > size:
            with_room[room - size].append(chosen)
            rooms |= 1 << (room - size)
        bins.append(chosen)
    return bins


class Windows:
    """Conversations as windows of one length; the conversations that share a window change with each epoch."""

    def __init__(self, data: Conversations, length: int, seed: int, packed: bool = True) -> None:
        """Args: `packed`: whether a window may contain several conversations; conversations are never cut."""
        self.data, self.length, self.seed, self.packed = data, length, seed, packed
        falling = np.sort(data.sizes)[::-1]
        bins = np.array(best_fit(falling.tolist(), length) if packed else np.arange(len(falling)), np.int64)
        # Indices in the order of decreasing size, window by window. Conversations of equal size are interchangeable:
        # each epoch exchanges them, so that the number of windows is constant.
        self._places = np.argsort(bins, kind="stable")
        self._ends = np.cumsum(np.bincount(bins))
        self._order = lru_cache(maxsize=2)(self._new_order)

    def __len__(self) -> int:
        return len(self._ends)

    def conversations(self, number: int) -> list[npt.NDArray[Any]]:
        """Returns the conversations of a window; the last window of an epoch is followed by the first of the next."""
        epoch, place = divmod(number, len(self))
        order, windows = self._order(epoch)
        window = int(windows[place])
        first = int(self._ends[window - 1]) if window else 0
        return [self.data[int(order[each])] for each in self._places[first : self._ends[window]]]

    def batch(self, windows: Sequence[int]) -> Batch:
        """Returns windows as sequences; the padding after the last conversation is a separate document."""
        found = [self.conversations(number) for number in windows]
        length = self.length
        if not self.packed:
            longest = max(len(window[0]) for window in found)
            length = min(-(-longest // ALIGNED) * ALIGNED, self.length)
        return _batch(found, length)

    def _new_order(self, epoch: int) -> tuple[Integers, Integers]:
        """Returns the conversations by decreasing size, and the windows, in the order of an epoch."""
        order = shuffled(len(self.data), self.seed, epoch)
        falling = order[np.argsort(-self.data.sizes[order], kind="stable")]
        return falling, shuffled(len(self), self.seed, epoch, WINDOWS)


def _batch(windows: Sequence[Sequence[npt.NDArray[Any]]], length: int) -> Batch:
    shape = len(windows), length
    ids, positions, documents = (np.zeros(shape, np.int64) for _ in range(3))
    labels = np.full(shape, -1, np.int64)
    for row, window in enumerate(windows):
        place = 0
        for number, tokens in enumerate(window):
            here = slice(place, place + len(tokens))
            ids[row, here], positions[row, here] = numbers(tokens), np.arange(len(tokens))
            documents[row, here] = number
            # Labels outside of answers are negative, which the loss ignores.
            labels[row, place : here.stop - 1] = tokens[1:]
            place = here.stop
        positions[row, place:], documents[row, place:] = np.arange(length - place), len(window)
    return Batch(*map(torch.from_numpy, (ids, labels, positions, documents)))


class ChatBatches:
    """Endless training batches, each window once per epoch; the counterpart of `ictx.data.loader.Batches`."""

    rows = 1
    """Sequences per window."""

    def __init__(self, stream: Windows, batch: int, rank: int, ranks: int, part: tuple[int, int] = (0, 1)) -> None:
        """Raises UserError if there are too few windows for one global batch; for the arguments, see `Batches`."""
        self.stream, self.batch, self.rank, self.ranks, self.part = stream, batch, rank, ranks, part
        self.taken, self.windows = 0, len(stream)
        if self.windows < batch * ranks:
            raise UserError(
                f"the training data has {self.windows} windows of {stream.length} tokens, but a global batch takes "
                f"{batch * ranks}: prepare more rows or lower train.batch_size"
            )

    def next(self) -> Batch:
        """Returns this rank's part of the next global batch."""
        first = self.taken + self.rank * self.batch
        self.taken += self.ranks * self.batch
        return self.stream.batch(range(first, first + self.batch)).part(*self.part)

    def state_dict(self) -> dict[str, int]:
        """Returns the position in the stream, and the settings that determine its order."""
        stream = self.stream
        return {"taken": self.taken, "length": stream.length, "seed": stream.seed, "packed": int(stream.packed)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at a position. Raises UserError if the order differs."""
        settings = {"length": "train.sequence_length", "seed": "train.seed", "packed": "packing"}
        for name, setting in settings.items():
            value = int(getattr(self.stream, name))
            if state[name] != value:
                raise UserError(f"{setting} is {value}, but the checkpoint's data has the order of {state[name]}")
        self.taken = state["taken"]
