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
    """Returns the folders that whoever started the container, and sees their owners, found to be root's."""
    return tuple(map(Path, filter(None, os.environ.get("ICTX_TRUSTED_DATA", "").split(":"))))


@dataclass(frozen=True)
class MixedCorpus:
    """Prepared data among others."""

    dir: Path | None = None
    """Its folder; data.dir unless given."""
    weight: float = 1.0
    """Tokens of it that are trained on, in proportion to the other corpora's weights, whatever their sizes are."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}: expected more than 0")


@dataclass(frozen=True)
class LongDocuments:
    """How much more often long documents are read than others (arXiv:2402.10171, section 3: within each corpus)."""

    tokens: int
    """A document of at least so many tokens is long."""
    weight: float
    """Tokens of long documents in proportion to what they are of the corpus: 5 reads them five times as often."""

    def __post_init__(self) -> None:
        if not 1 < self.tokens < 1 << 62:
            raise ValueError(f"tokens is {self.tokens}: expected more than 1")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}: expected more than 0")


@dataclass(frozen=True)
class DataConfig:
    """How a corpus becomes tokens."""

    vocab_size: int = 4096
    """Entries of the tokenizer's vocabulary."""
    min_bytes: int = 20_000_000
    """A smaller corpus is refused."""
    validation_share: float = 0.02
    """Share of the documents that are kept for validation; the text of a document decides, not its place."""
    seed: int = 0
    """Chooses the documents for validation and those that the tokenizer is trained on."""
    text_field: str = "text"
    """Field of a JSON line, column of a Parquet file or of a data set that holds a document."""
    longest_document: int = 16 << 20
    """Characters; what is longer becomes several documents. It bounds the memory that preparing takes."""
    tokenizer: Path | None = None
    """Folder with the tokenizer to use; one is trained on the corpus unless given."""
    tokenizer_bytes: int = 256 << 20
    """Text that a tokenizer is trained on: a sample of whole documents if the corpus has more."""
    shard_bytes: int = 1 << 30
    """Text of one file of tokens. The loader keeps a shard's index in memory and shuffles whole shards."""
    streaming: bool = True
    """Read data sets of the Hub over the network at each of the three passes, instead of downloading them first."""
    dir: Path | None = None
    """Prepared data (training only)."""
    mix: tuple[MixedCorpus, ...] = ()
    """Prepared data of several folders with one tokenizer, each with a weight (training only)."""
    long_documents: LongDocuments | None = None
    """Long documents are read more often than others, or less (training only)."""
    trusted_owners: tuple[int, ...] = ()
    """Numbers of users whose prepared data is used, besides one's own and root's."""
    trusted_dirs: tuple[Path, ...] = field(default_factory=trusted_by_environment)
    """Folders of prepared data that are used whoever owns them; in containers owners cannot be distinguished."""

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
            raise UserError("data.dir is needed: --set data.dir=FOLDER")
        if self.dir and self.dir not in known:
            raise UserError("data.dir is given, but each corpus of data.mix has a dir: leave one of them out")
        return known

    @property
    def weights(self) -> list[float]:
        """Weights of the corpora; together they need not be 1."""
        return [corpus.weight for corpus in self.mix] or [1.0]

    def identity(self) -> dict[str, Any]:
        """Returns the settings that the tokens depend on, once the documents are known."""
        names = ("vocab_size", "validation_share", "seed", "tokenizer_bytes", "shard_bytes")
        return {name: getattr(self, name) for name in names}
