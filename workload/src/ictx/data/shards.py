"""Prepared data on disk: shards of tokens, an index of documents beside each, and what is known of them in meta.json.

`train-00000.bin` holds the tokens of whole documents, one after the other, little-endian; `train-00000.idx` holds the
places where they end, as little-endian 64-bit integers. A document's hash chooses its shard: every shard is a sample of
the whole corpus.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ictx.data.progress import Progress
from ictx.errors import UserError

META_FILE, FORMAT = "meta.json", 2
SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")
INDEX_TYPE = np.dtype("<i8")
# Each needs two open files while the corpus is written, and systems allow 1,024.
MOST_SHARDS = 400
BLOCK = 1 << 22


class ShardWriter:
    """Writes a shard's two files."""

    def __init__(self, directory: Path, name: str) -> None:
        """Creates them empty."""
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
        """Puts the files on the disk and returns their entry in meta.json; an empty shard is removed instead."""
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
        """Appends a document to the shard that its hash chooses."""
        self.shards[int.from_bytes(digest[-8:], "big") % len(self.shards)].add(tokens)

    def close(self) -> list[dict[str, Any]]:
        """Returns the entries of all shards that hold something."""
        return [entry for shard in self.shards if (entry := shard.close())]


@dataclass(frozen=True)
class Shard:
    """A shard, memory-mapped."""

    tokens: npt.NDArray[Any]
    """All tokens, shape (tokens,)."""
    ends: npt.NDArray[np.int64]
    """Where each document ends, shape (documents,)."""


@dataclass(frozen=True)
class TokenArray:
    """A prepared split, memory-mapped."""

    shards: Sequence[Shard]
    meta: dict[str, Any]

    @classmethod
    def open(cls, directory: Path, split: SplitName) -> TokenArray:
        """Maps a split. Raises UserError when there is none, or a file has not the length that it should have."""
        meta = read_meta(directory)
        dtype = np.dtype(meta["dtype"])
        shards = []
        for entry in meta["splits"][split]:
            tokens = _mapped(directory / f"{entry['name']}.bin", dtype, entry["tokens"], "tokens")
            ends = _mapped(directory / f"{entry['name']}.idx", INDEX_TYPE, entry["documents"], "documents")
            shards.append(Shard(tokens, ends))
        return cls(shards, meta)

    def __len__(self) -> int:
        return sum(len(shard.tokens) for shard in self.shards)

    def windows(self, length: int) -> int:
        """Returns how many windows of `length` inputs and their next tokens there are."""
        return (len(self) - 1) // length

    def window(self, index: int, length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns window `index` in the order of the disk, and how many of its tokens are of each document.

        It has `length` tokens, and one more for the targets.
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
        return np.concatenate(parts).astype(np.int64), np.concatenate(lengths)


def read_meta(directory: Path) -> dict[str, Any]:
    """Returns the content of meta.json. Raises UserError when the folder has none that we can read."""
    try:
        meta: dict[str, Any] = json.loads((directory / META_FILE).read_text())
        number = meta.get("format", 1)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{directory} holds no prepared data ({error}): run `ictx data prepare`") from error
    if number != FORMAT:
        raise UserError(f"{directory} has format {number}, but this version reads {FORMAT}: run `ictx data prepare`")
    return meta


def _mapped(path: Path, dtype: np.dtype[Any], count: int, what: str) -> npt.NDArray[Any]:
    """Returns a file as an array. Raises UserError when it is missing or has another length than meta.json says."""
    try:
        size = path.stat().st_size
        if size == count * dtype.itemsize:
            return np.memmap(path, dtype, "r")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: remove the folder and prepare it again") from error
    raise UserError(
        f"{path} has {size / dtype.itemsize:,.10g} {what}, but {META_FILE} says {count:,}: "
        "remove the folder and prepare it again"
    )


def verify(directory: Path) -> dict[str, Any]:
    """Reads every byte and returns meta.json. Raises UserError naming the first file that is not what was written."""
    meta = read_meta(directory)
    sums = dict(meta["sha256"])
    for split in SPLITS:
        TokenArray.open(directory, split)
        for entry in meta["splits"][split]:
            sums |= entry["sha256"]
    paths = {directory / name: expected for name, expected in sums.items()}
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing: remove the folder and prepare it again")
    with Progress(f"verifying {directory}", sum(path.stat().st_size for path in paths)) as progress:
        for path, expected in paths.items():
            sha256 = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(BLOCK):
                    sha256.update(block)
                    progress.add(len(block))
            if sha256.hexdigest() != expected:
                raise UserError(
                    f"{path} is damaged: its SHA-256 is {sha256.hexdigest()}, but {META_FILE} says {expected}: remove "
                    "the folder and prepare it again"
                )
    return meta
