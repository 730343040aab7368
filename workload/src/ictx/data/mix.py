"""Several corpora as one stream, each with a share of the training tokens; long documents can have a larger share.

Windows are drawn without replacement: those of a corpus are in its own order (`ictx.data.stream`), and none is repeated
before its epoch is complete, regardless of the shares of other corpora.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ictx.data.config import DataConfig, LongDocuments
from ictx.data.shards import SplitName, TokenArray
from ictx.data.stream import Integers, Stream, shuffled
from ictx.errors import UserError

LEAST_BLOCK, MOST_BLOCK = 256, 1 << 20
# Separates the order of sources from the orders of documents under the same seed.
ORDER = 0x6D6978


class Schedule:
    """Maps windows to sources.

    In every block of windows, each source has as many as its share of all windows so far requires, to within one, in an
    order that depends on seed and block. The source of a window follows from its number alone.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        """Raises UserError if a weight is too small for a block."""
        total, self.seed = math.fsum(weights), seed
        self._edges = [math.fsum(weights[: number + 1]) / total for number in range(len(weights))]
        # Large enough that no source's count is negative after rounding.
        self.block = max(LEAST_BLOCK, math.ceil(2 * total / min(weights)))
        if self.block > MOST_BLOCK:
            raise UserError(
                f"a corpus has {min(weights) / total:.1e} of all weights: expected at least {2 / MOST_BLOCK:.1e}"
            )
        self._made = lru_cache(maxsize=2)(self._make)

    def __call__(self, number: int) -> tuple[int, int]:
        """Returns the source of a window, and the window's number among those of its source."""
        block, place = divmod(number, self.block)
        sources, own = self._made(block)
        return int(sources[place]), int(own[place])

    def counts(self, windows: int) -> Integers:
        """Returns each source's share of the first `windows` windows (a multiple of `block`), int64 (sources,)."""
        return np.diff([math.floor(edge * windows + 0.5) for edge in self._edges], prepend=0)

    def _make(self, block: int) -> tuple[Integers, Integers]:
        """Returns the sources of a block's windows, and their numbers there."""
        before, after = self.counts(block * self.block), self.counts((block + 1) * self.block)
        sources = np.repeat(np.arange(len(before)), after - before)
        sources = sources[shuffled(self.block, self.seed, block, ORDER)]
        own = np.empty_like(sources)
        for source, first in enumerate(before):
            own[sources == source] = np.arange(first, after[source])
        return sources, own


class MixedStream:
    """The windows of several streams, each with its share."""

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float]) -> None:
        """Raises UserError if a weight is too small."""
        self.streams, self.length, self.seed = streams, streams[0].length, streams[0].seed
        self.schedule = Schedule(weights, self.seed)
        self.windows = sum(stream.windows for stream in streams)

    def window(self, number: int) -> tuple[Integers, Integers]:
        """Returns window `number`; see `Stream.window`."""
        source, own = self.schedule(number)
        return self.streams[source].window(own)


@dataclasses.dataclass(frozen=True)
class Mix:
    """A split of several corpora; `TokenArray` is that of one."""

    arrays: Sequence[TokenArray]
    weights: Sequence[float]
    """Shares of all tokens; their sum is 1."""
    meta: dict[str, Any]

    def windows(self, length: int) -> int:
        """Returns the number of windows until the first corpus is exhausted."""
        return min(math.floor(array.windows(length) / weight) for array, weight in self._each())

    def window(self, index: int, length: int) -> tuple[Integers, Integers]:
        """Returns window `index` of the concatenated corpora; see `TokenArray.window`."""
        total, last = self.windows(length), 0.0
        for array, weight in self._each():
            first, last = last, last + weight * total
            if index < round(last) or array is self.arrays[-1]:
                return array.window(min(index - round(first), array.windows(length) - 1), length)
        raise AssertionError

    def stream(self, length: int, seed: int) -> MixedStream:
        """Returns the training windows. Raises UserError naming a corpus that has none."""
        for array in self.arrays:
            if not array.windows(length):
                raise UserError(f"{array} has no window of {length} tokens: prepare a larger corpus")
        return MixedStream([Stream(array, length, seed) for array in self.arrays], self.weights)

    def _each(self) -> zip[tuple[TokenArray, float]]:
        return zip(self.arrays, self.weights, strict=True)


def opened(directories: Sequence[Path], config: DataConfig, split: SplitName) -> TokenArray | Mix:
    """Returns a split of the corpora in `directories`, mixed as `config` sets.

    Raises UserError naming a corpus that cannot be mixed with the others.
    """
    arrays = [TokenArray.open(directory, split) for directory in directories]
    long = config.long_documents if split == "train" else None
    if not config.mix and long is None:
        return arrays[0]
    meta = _common(arrays)
    total = math.fsum(config.weights)
    weights = [weight / total for weight in config.weights]
    entropies = [array.meta["unigram_entropy"] for array in arrays]
    plan = [[array.meta["fingerprint"], weight] for array, weight in zip(arrays, weights, strict=True)]
    described = json.dumps([plan, long and dataclasses.asdict(long)], sort_keys=True)
    meta |= {
        "fingerprint": hashlib.sha256(described.encode()).hexdigest(),
        # A lower bound of the mix's entropy: each corpus is predicted by its own frequencies.
        "unigram_entropy": math.fsum(weight * value for weight, value in zip(weights, entropies, strict=True)),
    }
    parts = [part for array, weight in zip(arrays, weights, strict=True) for part in _by_length(array, weight, long)]
    return Mix([array for array, _ in parts], [weight for _, weight in parts], meta)


def _common(arrays: Sequence[TokenArray]) -> dict[str, Any]:
    """Returns the metadata of the first corpus. Raises UserError for different tokenizers, or a repeated corpus."""
    first, seen = arrays[0], dict[str, TokenArray]()
    for array in arrays:
        if array.meta["sha256"] != first.meta["sha256"]:
            raise UserError(
                f"{array} has another tokenizer than {first}: prepare it with data.tokenizer={first.directory}"
            )
        if other := seen.get(array.meta["fingerprint"]):
            raise UserError(f"{array} is the same corpus as {other}: list it once, with a larger weight")
        seen[array.meta["fingerprint"]] = array
    return dict(first.meta)


def _by_length(array: TokenArray, weight: float, long: LongDocuments | None) -> list[tuple[TokenArray, float]]:
    """Returns a corpus's short and long documents with their parts of its weight."""
    if long is None:
        return [(array, weight)]
    short, rest = array.only(range(long.tokens)), array.only(range(long.tokens, 1 << 62))
    sizes = len(short), len(rest) * long.weight
    parts = zip((short, rest), sizes, strict=True)
    return [(part, weight * size / sum(sizes)) for part, size in parts if size]
