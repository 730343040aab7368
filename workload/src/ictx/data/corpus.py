"""A corpus: the distinct documents of its sources, in an order that is independent of the machine."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ictx.data.config import DataConfig
from ictx.data.progress import Progress
from ictx.data.skipped import Skipped
from ictx.data.sources import source
from ictx.errors import UserError

# Bytes of the hash that identifies documents: among 10¹² documents, the probability of a collision is 10⁻¹⁵.
HASH_BYTES = 16
CACHE_KIB = 64 << 10


@dataclass(frozen=True)
class Document:
    """A text and the SHA-256 of its UTF-8 bytes."""

    text: str
    digest: bytes
    bytes: int
    """UTF-8 bytes of the text."""

    @classmethod
    def of(cls, text: str) -> Document:
        """Returns a text with its hash. Halves of surrogate pairs, which JSON can hold and UTF-8 cannot, become `?`."""
        try:
            content = text.encode()
        except UnicodeEncodeError:
            content = text.encode(errors="replace")
            text = content.decode()
        return cls(text, hashlib.sha256(content).digest(), len(content))

    def share(self, salt: str) -> float:
        """Returns a number in [0, 1) that depends only on text and salt."""
        digest = hashlib.sha256(salt.encode() + self.digest).digest()
        return int.from_bytes(digest[:6], "big") / (1 << 48)


class Seen:
    """A set of hashes of any size: an SQLite B-tree with a 64 MiB cache, in a temporary file."""

    def __init__(self) -> None:
        """Creates an empty set; its unnamed temporary file is deleted with this object."""
        # Training of a tokenizer reads documents in a separate thread, but never in two threads at once.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for pragma in (f"cache_size = -{CACHE_KIB}", "journal_mode = OFF", "synchronous = OFF"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def add(self, digest: bytes) -> bool:
        """Adds a digest; returns whether it is new. Raises UserError if the temporary file cannot grow."""
        try:
            return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest[:HASH_BYTES],)).rowcount == 1
        except sqlite3.Error as error:
            raise UserError(f"cannot keep hashes of documents in a temporary file (TMPDIR): {error}") from error


@dataclass(frozen=True)
class Summary:
    """Statistics of a pass over a corpus."""

    documents: int
    repeated: int
    """Number of duplicate documents."""
    bytes: int
    """UTF-8 bytes of all distinct documents."""
    fingerprint: str
    """SHA-256 over the documents; independent of their paths."""
    skipped: tuple[str, ...] = ()
    """Skipped files and rows: one line per reason."""


class Corpus:
    """The distinct documents of the sources. Text is read again in each pass, so that memory use is constant."""

    def __init__(self, names: Sequence[str], config: DataConfig) -> None:
        """Raises UserError for a path that does not exist."""
        self.sources = [source(name) for name in sorted(names)]
        self.config = config

    def documents(self) -> Iterator[Document]:
        """Yields each document once."""
        seen = Seen()
        yield from (document for document, new in self._all(seen, Skipped()) if new)

    def scan(self) -> Summary:
        """Reads all documents once. Raises UserError for an empty source, or a corpus that is too small."""
        documents = repeated = size = 0
        fingerprint, skipped = hashlib.sha256(), Skipped()
        with Progress("reading the corpus") as progress:
            for document, new in self._all(Seen(), skipped):
                progress.add(document.bytes)
                if not new:
                    repeated += 1
                    continue
                documents, size = documents + 1, size + document.bytes
                fingerprint.update(document.digest)
        if size < self.config.min_bytes:
            names = ", ".join(str(source) for source in self.sources)
            raise UserError(
                f"{names} has {size:,} bytes of text: at least {self.config.min_bytes:,} are required (data.min_bytes)"
                + "".join(f"; {line}" for line in skipped.lines())
            )
        return Summary(documents, repeated, size, fingerprint.hexdigest(), tuple(skipped.lines()))

    def _all(self, seen: Seen, skipped: Skipped) -> Iterator[tuple[Document, bool]]:
        """Yields every document, and whether it is new; counts skipped files and rows."""
        for each in self.sources:
            empty = True
            for text in each.texts(self.config, skipped):
                for start in range(0, len(text), self.config.longest_document):
                    piece = text[start : start + self.config.longest_document]
                    document = Document.of(piece)
                    empty = False
                    yield document, seen.add(document.digest)
            if empty:
                why = "; ".join(skipped.lines()) or "UTF-8 is expected, plain or compressed, JSON lines, or Parquet"
                raise UserError(f"{each} is empty: it holds no text ({why})")
