"""The documents of a corpus, shuffled in each epoch and cut into windows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ictx.data.shards import TokenArray

Integers = npt.NDArray[np.int64]
# Orders in memory: those of the current shard and of the next one, into which its last windows extend, and spare ones
# for a batch on the border of two shards and of two epochs.
KEPT = 10


def shuffled(count: int, *seeds: int) -> Integers:
    """Returns a permutation of range(count) that depends only on the seeds, not on machine or NumPy version.

    Sorts the numbers by their SplitMix64 hash (Steele et al., 2014, figure 15); equal keys stay in order.
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
    """The tokens of all documents in an infinite sequence of epochs, cut into shuffled windows.

    An epoch contains every document once: shards in an order that depends on seed and epoch, and the documents of each
    shard in such an order. The windows that begin in a shard are shuffled too, so that a long document does not fill
    consecutive batches. Every shard is a sample of the corpus, so only the indexes of shards being read are in memory.
    """

    def __init__(self, data: TokenArray, length: int, seed: int) -> None:
        """Args: `length`: tokens per window. Sets `windows`: windows per epoch."""
        self.data, self.length, self.seed = data, length, seed
        self.tokens, self.windows = len(data), data.windows(length)
        self._kept: dict[tuple[str, int, int], tuple[Integers, Integers]] = {}

    def window(self, number: int) -> tuple[Integers, Integers]:
        """Returns window `number` of `length` + 1 tokens (inputs and targets); see `read`."""
        # Shuffled only among the windows that begin in the same shard.
        epoch, place = divmod(number * self.length, self.tokens)
        shards, ends = self._shards(epoch)
        at = int(np.searchsorted(ends, place, "right"))
        start, end = (epoch * self.tokens + int(edge) for edge in (ends[at - 1] if at else 0, ends[at]))
        first, last = -(-start // self.length), -(-end // self.length)
        order, _ = self._windows(epoch, int(shards[at]), last - first)
        return self.read((first + int(order[number - first])) * self.length, self.length + 1)

    def read(self, position: int, count: int) -> tuple[Integers, Integers]:
        """Returns tokens [position, position + count), int64 (count,), and how many of them are of each document."""
        tokens, lengths = np.empty(count, np.int64), []
        filled = 0
        while filled < count:
            epoch, place = divmod(position + filled, self.tokens)
            shards, ends = self._shards(epoch)
            at = int(np.searchsorted(ends, place, "right"))
            shard = self.data.shards[shards[at]]
            place -= int(ends[at - 1]) if at else 0
            documents, ends = self._documents(epoch, int(shards[at]))
            first = int(np.searchsorted(ends, place, "right"))
            for number in range(first, len(documents)):
                stop = int(shard.ends[documents[number]])
                start = stop - int(ends[number] - place)
                taken = min(stop - start, count - filled)
                tokens[filled : filled + taken] = shard.tokens[start : start + taken]
                lengths.append(taken)
                filled, place = filled + taken, place + taken
                if filled == count:
                    break
        self.data.require_known(tokens)
        return tokens, np.array(lengths, np.int64)

    def _shards(self, epoch: int) -> tuple[Integers, Integers]:
        """Returns the shards in the order of an epoch, and their end positions in it."""
        sizes = np.array([shard.size for shard in self.data.shards], np.int64)
        return self._keep(("shards", epoch, 0), lambda: _in_order(shuffled(len(sizes), self.seed, epoch), sizes))

    def _documents(self, epoch: int, shard: int) -> tuple[Integers, Integers]:
        """Returns the documents of a shard in the order of an epoch, and their end positions in it."""

        def order() -> tuple[Integers, Integers]:
            numbers, sizes = self.data.shards[shard].documents()
            order, ends = _in_order(shuffled(len(sizes), self.seed, epoch, shard), sizes)
            return numbers[order], ends

        return self._keep(("documents", epoch, shard), order)

    def _windows(self, epoch: int, shard: int, count: int) -> tuple[Integers, Integers]:
        """Returns the windows that begin in a shard in the order of an epoch, and an empty array."""
        key = ("windows", epoch, shard)
        return self._keep(key, lambda: (shuffled(count, self.seed, epoch, shard, 1), np.empty(0, np.int64)))

    def _keep(
        self, key: tuple[str, int, int], make: Callable[[], tuple[Integers, Integers]]
    ) -> tuple[Integers, Integers]:
        """Returns the cached value of a key, or computes it; evicts the least recently used one."""
        self._kept[key] = self._kept.pop(key) if key in self._kept else make()
        if len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        return self._kept[key]


def _in_order(order: Integers, sizes: Integers) -> tuple[Integers, Integers]:
    """Returns an order, and the end position of each element in it."""
    return order, np.cumsum(sizes[order])
