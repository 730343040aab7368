"""Documents: the distinct text files below some paths, in an order that does not depend on the machine."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ictx.errors import UserError

# Longer files (generated tables, change logs of decades) are cut into documents of this many characters.
LONGEST_DOCUMENT = 1 << 20
SKIPPED_FOLDERS = {"__pycache__", ".git"}


def read_text(path: Path) -> str | None:
    """Returns the text of a plain or gzipped file, or None for one that is not UTF-8 text or cannot be read."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        text = content.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return None
    return None if "\0" in text else text


def text_files(paths: Sequence[Path]) -> list[Path]:
    """Returns every regular file at or below the paths, sorted. Raises UserError for a path that does not exist."""
    found: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise UserError(f"corpus path {path} does not exist")
        if path.is_file():
            found.add(path)
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
            found.update(file for name in names if (file := Path(folder, name)).is_file() and not file.is_symlink())
    return sorted(found)


@dataclass
class Corpus:
    """The distinct documents of the files below `paths`; text is read again at each pass, so memory stays flat."""

    paths: Sequence[Path]
    files: list[Path] = field(default_factory=list)
    """Files that hold text not seen in an earlier one."""
    bytes: int = 0
    """UTF-8 bytes of all documents."""
    fingerprint: str = ""
    """SHA-256 over the contents: the same text has the same fingerprint wherever it lies."""

    @classmethod
    def scan(cls, paths: Sequence[Path], min_bytes: int) -> Corpus:
        """Reads everything once. Raises UserError naming a path that is missing or empty, or a corpus too small."""
        corpus = cls(paths)
        seen: set[bytes] = set()
        repeated: list[Path] = []
        total = hashlib.sha256()
        for file in text_files(paths):
            text = read_text(file)
            if not text:
                continue
            content = text.encode()
            digest = hashlib.sha256(content).digest()
            if digest in seen:
                repeated.append(file)
                continue
            seen.add(digest)
            total.update(digest)
            corpus.files.append(file)
            corpus.bytes += len(content)
        for path in paths:
            if not any(file.is_relative_to(path) for file in [*corpus.files, *repeated]):
                raise UserError(f"corpus path {path} is empty: it holds no text (UTF-8, plain or gzipped)")
        if corpus.bytes < min_bytes:
            where = ", ".join(map(str, paths))
            raise UserError(f"corpus {where} has {corpus.bytes:,} bytes of text: at least {min_bytes:,} are asked for")
        corpus.fingerprint = total.hexdigest()
        return corpus

    def documents(self) -> Iterator[str]:
        """Yields each document."""
        for file in self.files:
            text = read_text(file)
            if text is None:
                raise UserError(f"corpus file {file} changed while it was read: run again")
            for start in range(0, len(text), LONGEST_DOCUMENT):
                yield text[start : start + LONGEST_DOCUMENT]
