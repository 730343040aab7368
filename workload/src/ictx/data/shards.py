"""Prepared data on disk: shards of tokens, an index of documents for each, and metadata in meta.json.

`train-00000.bin` contains the tokens of whole documents, concatenated, little-endian; `train-00000.idx` contains the
documents' end positions (in tokens) as little-endian 64-bit integers. The shard of a document is selected by its hash,
so that every shard is a sample of the whole corpus.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ictx.data.tokenizer import TOKENIZER_FILES
from ictx.errors import UserError
from ictx.manifest import Entry, Unusable, is_sha256, read_json
from ictx.settings import shown

META_FILE, FORMAT = "meta.json", 2
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")
INDEX_TYPE = np.dtype("<i8")
TOKEN_TYPES = ("<u2", "<u4")
# Each needs two open files while the corpus is written; the usual limit is 1,024.
MOST_SHARDS = 400


class ShardWriter:
    """Writes a shard's two files."""

    def __init__(self, directory: Path, name: str) -> None:
        """Creates the files, empty."""
        self.name, self.tokens, self.documents = name, 0, 0
        self._paths = [directory / f"{name}.bin", directory / f"{name}.idx"]
        self._files = [path.open("wb") for path in self._paths]
        self._hashes = [hashlib.sha256(), hashlib.sha256()]

    def add(self, tokens: npt.NDArray[Any]) -> None:
        """Appends a document."""
        self.tokens, self.documents = self.tokens + len(tokens), self.documents + 1
        contents = tokens.tobytes(), self.tokens.to_bytes(8, "little")
        for file, sha256, content in zip(self._files, self._hashes, contents, strict=True):
            file.write(content)
            sha256.update(content)

    def close(self) -> dict[str, Any] | None:
        """Syncs the files to disk and returns their entry in meta.json; removes an empty shard and returns None."""
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if not self.documents:
            for path in self._paths:
                path.unlink()
            return None
        sums = {path.name: sha256.hexdigest() for path, sha256 in zip(self._paths, self._hashes, strict=True)}
        return {"name": self.name, "tokens": self.tokens, "documents": self.documents, "sha256": sums}


class SplitWriter:
    """Writes the shards of a split."""

    def __init__(self, directory: Path, split: SplitName, shards: int) -> None:
        """Creates the files."""
        self.shards = [ShardWriter(directory, f"{split}-{number:05}") for number in range(min(shards, MOST_SHARDS))]

    def add(self, tokens: npt.NDArray[Any], digest: bytes) -> None:
        """Appends a document to the shard that its hash selects."""
        self.shards[int.from_bytes(digest[-8:], "big") % len(self.shards)].add(tokens)

    def close(self) -> list[dict[str, Any]]:
        """Closes the shards; returns the entries of those that are not empty."""
        return [entry for shard in self.shards if (entry := shard.close())]


@dataclass(frozen=True)
class Shard:
    """A shard, memory-mapped."""

    tokens: npt.NDArray[Any]
    """All tokens, shape (tokens,)."""
    ends: npt.NDArray[np.int64]
    """End position of each document, shape (documents,)."""
    lengths: range | None = None
    """Lengths (in tokens) of the documents that are read; None: all."""

    @cached_property
    def size(self) -> int:
        """Total tokens of the documents that are read."""
        return len(self.tokens) if self.lengths is None else int(self.documents()[1].sum())

    def documents(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns numbers and lengths of the documents that are read, each of shape (documents,)."""
        sizes = np.diff(self.ends, prepend=0)
        numbers = np.arange(len(sizes))
        if self.lengths is None:
            return numbers, sizes
        read = (sizes >= self.lengths.start) & (sizes < self.lengths.stop)
        return numbers[read], sizes[read]


@dataclass(frozen=True)
class TokenArray:
    """A prepared split, memory-mapped."""

    shards: Sequence[Shard]
    meta: dict[str, Any]
    directory: Path = Path()
    """Its folder."""

    @classmethod
    def open(cls, directory: Path, split: SplitName) -> TokenArray:
        """Maps a split. Raises UserError if it is missing, or if a file's length differs from meta.json."""
        meta = read_meta(directory)
        dtype = np.dtype(meta["dtype"])
        shards = []
        for entry in meta["splits"][split]:
            tokens = _mapped(directory / f"{entry['name']}.bin", dtype, entry["tokens"], "tokens")
            ends = _mapped(directory / f"{entry['name']}.idx", INDEX_TYPE, entry["documents"], "documents")
            shards.append(Shard(tokens, ends))
        return cls(shards, meta, directory)

    def __len__(self) -> int:
        return sum(shard.size for shard in self.shards)

    def __str__(self) -> str:
        lengths = self.shards[0].lengths if self.shards else None
        return f"{self.directory}{f' (documents of {lengths} tokens)' if lengths else ''}"

    def only(self, lengths: range) -> TokenArray:
        """Returns the documents with these lengths, for streams; `window` still reads all documents."""
        return replace(self, shards=[replace(shard, lengths=lengths) for shard in self.shards])

    def windows(self, length: int) -> int:
        """Returns the number of windows of `length` inputs and their targets."""
        return (len(self) - 1) // length

    def window(self, index: int, length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns window `index` in the order on disk, int64 (length + 1,), and the tokens of each document in it.

        The last token is only a target. Raises UserError for a token outside the vocabulary.
        """
        start, missing = index * length, length + 1
        parts: list[npt.NDArray[Any]] = []
        lengths: list[npt.NDArray[np.int64]] = []
        for shard in self.shards:
            if start < len(shard.tokens) and missing:
                stop = min(start + missing, len(shard.tokens))
                first, last = np.searchsorted(shard.ends, start, "right"), np.searchsorted(shard.ends, stop)
                parts.append(shard.tokens[start:stop])
                lengths.append(np.diff(shard.ends[first:last], prepend=start, append=stop))
                missing -= stop - start
            start = max(start - len(shard.tokens), 0)
        tokens = np.concatenate(parts).astype(np.int64)
        self.require_known(tokens)
        return tokens, np.concatenate(lengths)

    def require_known(self, tokens: npt.NDArray[np.int64]) -> None:
        """Raises UserError for a token outside the vocabulary, which checksums do not detect if it was written so."""
        size = self.meta.get("vocab_size")
        if size is not None and tokens.max() >= size:
            raise UserError(
                f"{self.directory} holds token {tokens.max()}, but its vocabulary has {size} entries: prepare it again"
            )


def read_meta(directory: Path) -> dict[str, Any]:
    """Returns the content of meta.json. Raises Unusable if it is missing or invalid."""
    try:
        meta: Any = read_json(directory / META_FILE)
    except Unusable as error:
        raise Unusable(f"{directory} holds no prepared data ({error}): run `ictx data prepare`") from error
    if isinstance(meta, dict) and "kind" in meta:
        raise Unusable(
            f"{directory} holds {shown(meta['kind'])} data, not tokens of a corpus: prepare a corpus with a "
            "configuration of pretraining"
        )
    number = meta.get("format", 1) if isinstance(meta, dict) else meta
    if number != FORMAT:
        raise Unusable(
            f"{directory} has format {shown(number)}, but this version reads {FORMAT}: run `ictx data prepare`"
        )
    if not _whole(meta):
        raise Unusable(f"{directory / META_FILE} is invalid for {FORMAT=}: run `ictx data prepare`")
    return dict(meta)


def _whole(meta: dict[str, Any]) -> bool:
    """Returns whether meta.json has all required entries, with valid types."""

    def count(value: object) -> bool:
        return type(value) is int and 0 <= value < 1 << 63

    def sums(value: object, names: Collection[str]) -> bool:
        return isinstance(value, dict) and set(value) == set(names) and all(map(is_sha256, value.values()))

    def shard(entry: object, split: str) -> bool:
        return (
            isinstance(entry, dict)
            and bool(re.fullmatch(rf"{split}-\d{{5}}", str(entry.get("name"))))
            and count(entry.get("tokens"))
            and count(entry.get("documents"))
            and sums(entry.get("sha256"), [f"{entry['name']}.{kind}" for kind in ("bin", "idx")])
        )

    splits, end, entropy = meta.get("splits"), meta.get("end_of_text"), meta.get("unigram_entropy")
    return (
        isinstance(meta.get("fingerprint"), str)
        and meta.get("dtype") in TOKEN_TYPES
        and all(count(meta.get(name)) for name in ("vocab_size", *(f"{split}_tokens" for split in SPLITS)))
        and sums(meta.get("sha256"), TOKENIZER_FILES)
        and isinstance(end, list)
        and list(map(type, end)) == [int, str]
        and isinstance(entropy, int | float)
        and abs(entropy) <= sys.float_info.max
        and isinstance(splits, dict)
        and all(isinstance(splits.get(split), list) and splits[split] for split in SPLITS)
        and all(shard(entry, split) for split in SPLITS for entry in splits[split])
    )


def files_of(meta: dict[str, Any]) -> dict[str, Entry]:
    """Returns the files that meta.json lists."""
    files = {name: Entry(sha256) for name, sha256 in meta["sha256"].items()}
    for entry in (entry for split in SPLITS for entry in meta["splits"][split]):
        sizes = entry["tokens"] * np.dtype(meta["dtype"]).itemsize, entry["documents"] * INDEX_TYPE.itemsize
        for size, kind in zip(sizes, ("bin", "idx"), strict=True):
            name = f"{entry['name']}.{kind}"
            files[name] = Entry(entry["sha256"][name], size)
    return files


def _mapped(path: Path, dtype: np.dtype[Any], count: int, what: str) -> npt.NDArray[Any]:
    """Returns a file as an array. Raises UserError if it is missing or its length differs from meta.json."""
    try:
        size = path.stat().st_size
        if size == count * dtype.itemsize:
            return np.memmap(path, dtype, "r")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: remove the folder and prepare it again") from error
    raise UserError(
        f"{path} has {size / dtype.itemsize:,.10g} {what}, but {META_FILE} expects {count:,}: "
        "remove the folder and prepare it again"
    )
