"""Settings of a corpus."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ictx.data.tokenizer import SMALLEST_VOCABULARY
from ictx.errors import UserError


def trusted_by_environment() -> tuple[Path, ...]:
    """Returns the folders that the container's launcher, which sees real owners, verified to be owned by root."""
    return tuple(map(Path, filter(None, os.environ.get("ICTX_TRUSTED_DATA", "").split(":"))))


@dataclass(frozen=True)
class MixedCorpus:
    """A corpus of a mix."""

    dir: Path | None = None
    """Folder of prepared data; default: data.dir."""
    weight: float = 1.0
    """Share of the training tokens, relative to the other corpora's weights; independent of their sizes."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}: expected more than 0")


@dataclass(frozen=True)
class LongDocuments:
    """Upsampling of long documents within each corpus (arXiv:2402.10171, section 3)."""

    tokens: int
    """Minimum tokens of a long document."""
    weight: float
    """Sampling factor of long documents: with 5, they are read five times as often as the others."""

    def __post_init__(self) -> None:
        if not 1 < self.tokens < 1 << 62:
            raise ValueError(f"tokens is {self.tokens}: expected more than 1")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}: expected more than 0")


@dataclass(frozen=True)
class DataConfig:
    """Preparation and reading of a corpus."""

    vocab_size: int = 4096
    """Size of the tokenizer's vocabulary."""
    min_bytes: int = 20_000_000
    """Minimum size of the corpus; a smaller one is an error."""
    validation_share: float = 0.02
    """Share of documents held out for validation; selected by a hash of the text, independent of order."""
    seed: int = 0
    """Random seed of the selection for validation and for the tokenizer's training."""
    text_field: str = "text"
    """Field of JSON lines, or column of Parquet files and data sets, with the document's text."""
    longest_document: int = 16 << 20
    """Maximum characters of a document; longer ones are split. Bounds the memory of the preparation."""
    tokenizer: Path | None = None
    """Folder with the tokenizer; default: a tokenizer is trained on the corpus."""
    tokenizer_bytes: int = 256 << 20
    """Maximum bytes of text to train the tokenizer on: a sample of whole documents if the corpus has more."""
    shard_bytes: int = 1 << 30
    """Bytes of text per shard. The loader keeps a shard's index in memory and shuffles whole shards."""
    streaming: bool = True
    """Stream data sets of the Hub over the network in each of the three passes, instead of downloading them first."""
    dir: Path | None = None
    """Prepared data (training only)."""
    mix: tuple[MixedCorpus, ...] = ()
    """Prepared data of several folders with one tokenizer, each with a weight (training only)."""
    long_documents: LongDocuments | None = None
    """Sample long documents more or less often than others (training only)."""
    trusted_owners: tuple[int, ...] = ()
    """User ids whose prepared data is trusted, besides one's own and root's."""
    trusted_dirs: tuple[Path, ...] = field(default_factory=trusted_by_environment)
    """Folders of prepared data that are trusted regardless of owner, because containers cannot distinguish owners."""

    def __post_init__(self) -> None:
        if not SMALLEST_VOCABULARY <= self.vocab_size <= 1 << 31:
            raise ValueError(
                f"vocab_size is {self.vocab_size}: expected at least {SMALLEST_VOCABULARY} (all bytes and the special "
                "tokens)"
            )
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}: expected more than 0 and less than 1")
        for name in ("min_bytes", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 0 or more")
        for name in ("longest_document", "tokenizer_bytes", "shard_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")

    @property
    def dirs(self) -> list[Path]:
        """Folders of prepared data, in the order of `weights`. Raises UserError for an unknown one."""
        found = [corpus.dir or self.dir for corpus in self.mix] if self.mix else [self.dir]
        known = [path for path in found if path]
        if len(known) < len(found):
            raise UserError("data.dir is not set: add --set data.dir=FOLDER, the path that `ictx data prepare` printed")
        if self.dir and self.dir not in known:
            raise UserError("data.dir is set, but each corpus of data.mix has a dir: leave one of them out")
        return known

    @property
    def weights(self) -> list[float]:
        """Weights of the corpora; not normalized."""
        return [corpus.weight for corpus in self.mix] or [1.0]

    def identity(self) -> dict[str, Any]:
        """Returns the settings that the tokens depend on, besides the documents."""
        names = ("vocab_size", "validation_share", "seed", "tokenizer_bytes", "shard_bytes")
        return {name: getattr(self, name) for name in names}
