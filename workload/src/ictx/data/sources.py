"""Sources of documents: files, folders, pipes, data sets of the Hugging Face Hub.

Everything is streamed: memory use does not grow with the corpus.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ictx.data.chat.config import ChatDataConfig
from ictx.data.chat.records import Record, holds_records, records
from ictx.data.config import DataConfig
from ictx.data.formats import read
from ictx.data.skipped import Skipped, Unreadable
from ictx.errors import UserError

SKIPPED_FOLDERS = {"__pycache__", ".git"}
# No colon, because it separates the paths in a list.
HUB = "hf="


def source(name: str) -> Files | Pipe | Hub:
    """Returns the source of a name: `hf=NAME[,CONFIG[,SPLIT]]`, else a path. Raises UserError."""
    if not name.startswith(HUB):
        path = Path(name)
        try:
            kind = path.stat().st_mode
        except (OSError, ValueError) as error:
            why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
            raise UserError(f"corpus path {path} {why}") from error
        if stat.S_ISFIFO(kind):
            return Pipe(path)
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            raise UserError(f"corpus path {path} is not a file, folder or pipe")
        return Files(path)
    parts = name[len(HUB) :].split(",")
    if not parts[0] or len(parts) > 3:
        raise UserError(f"corpus {name}: expected {HUB}NAME, {HUB}NAME,CONFIG or {HUB}NAME,CONFIG,SPLIT")
    dataset, config, split = [*parts, "", ""][:3]
    return Hub(dataset, config or None, split or "train")


@dataclass(frozen=True)
class Files:
    """A file, or all files below a folder in the order of their names; links are followed."""

    path: Path

    def __str__(self) -> str:
        return f"corpus path {self.path}"

    def texts(self, config: DataConfig, skipped: Skipped) -> Iterator[str]:
        """Yields the documents. Raises UserError naming a file that is damaged."""
        if self.path.is_file():
            yield from _named(self, self.path, config, skipped)
            return
        for file in _below(self.path, skipped, set()):
            try:
                yield from read(file, config, skipped, named=False)
            except Unreadable as error:
                # Not an error: a folder may contain other files.
                skipped.add(file, "file", str(error))

    def records(self, config: ChatDataConfig, skipped: Skipped) -> Iterator[Record]:
        """Yields the records with their locations. Raises UserError naming a file that is damaged."""
        if self.path.is_file():
            yield from records(self.path)
            return
        for file in _below(self.path, skipped, set()):
            if holds_records(file):
                yield from records(file)
            else:
                skipped.add(file, "file", "suffix is not .jsonl, .json or .parquet")


class Pipe:
    """Content of a pipe, such as `<(zcat …)`, in a temporary file, because a corpus is read several times."""

    def __init__(self, path: Path) -> None:
        """Reads the pipe to its end. Raises UserError if the temporary file cannot grow."""
        self.path = path
        # Unnamed: deleted with this object, however the process ends.
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            with path.open("rb") as content:
                shutil.copyfileobj(content, self._file)
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot copy {self} to a temporary file (TMPDIR): {error.strerror}") from error

    def __str__(self) -> str:
        return f"corpus pipe {self.path}"

    def texts(self, config: DataConfig, skipped: Skipped) -> Iterator[str]:
        """Yields the documents. Raises UserError if they are damaged."""
        yield from _named(self, Path(f"/dev/fd/{self._file.fileno()}"), config, skipped)

    def records(self, config: ChatDataConfig, skipped: Skipped) -> Iterator[Record]:
        """Yields the records with their locations. Raises UserError if they are damaged."""
        kept = f"/dev/fd/{self._file.fileno()}"
        try:
            for where, record in records(Path(kept)):
                yield where.replace(kept, str(self), 1), record
        except UserError as error:
            raise UserError(str(error).replace(kept, str(self))) from error


def _named(each: Files | Pipe, file: Path, config: DataConfig, skipped: Skipped) -> Iterator[str]:
    """Yields the documents of an explicitly named file. Raises UserError if it is not readable."""
    try:
        yield from read(file, config, skipped, named=True)
    except Unreadable as error:
        raise UserError(f"{each} cannot be read as text: {error}") from error
    except UserError as error:
        # The message has the file's path, which is a temporary one for a pipe.
        raise UserError(f"{each}: {error}" if isinstance(each, Pipe) else str(error)) from error


def _below(folder: Path, skipped: Skipped, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Yields regular files depth first; keeps only the entries of open folders and the ids of all folders in memory.

    Args:
        seen: folders already read, by device and inode, because symbolic links may form cycles.
    """
    try:
        about = folder.stat()
        if (about.st_dev, about.st_ino) in seen:
            return
        seen.add((about.st_dev, about.st_ino))
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        skipped.add(folder, "folder", f"cannot be opened: {error.strerror}")
        return
    for entry in found:
        path = Path(entry.path)
        try:
            kind = entry.stat().st_mode
        except OSError as error:
            skipped.add(path, "file", f"cannot be opened: {error.strerror}")
            continue
        if stat.S_ISDIR(kind) and entry.name in SKIPPED_FOLDERS:
            skipped.add(path, "folder", "not documents")
        elif stat.S_ISDIR(kind):
            yield from _below(path, skipped, seen)
        elif stat.S_ISREG(kind):
            yield path
        else:
            skipped.add(path, "file", "not a regular file")


@dataclass(frozen=True)
class Hub:
    """A data set by its name on the Hugging Face Hub, or a folder in any layout that `datasets` supports."""

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"data set {self.name}"

    def texts(self, config: DataConfig, skipped: Skipped) -> Iterator[str]:
        """Yields the documents. Raises UserError if the data set cannot be read."""
        for _, row in self._rows(config.streaming):
            text = row.get(config.text_field)
            if text is None and config.text_field in row:
                skipped.add(self.name, "row", "without text")
                continue
            if not isinstance(text, str):
                raise UserError(
                    f"{self} has no text in {config.text_field!r} (data.text_field): it has {', '.join(row)}"
                )
            yield text

    def records(self, config: ChatDataConfig, skipped: Skipped) -> Iterator[Record]:
        """Yields the records with their locations. Raises UserError if the data set cannot be read."""
        for number, row in self._rows(config.streaming):
            yield f"{self} row {number}", {name: value for name, value in row.items() if value is not None}

    def _rows(self, streaming: bool) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields row numbers, from 1, and rows."""
        # Takes seconds to import, and few corpora need it.
        import datasets

        try:
            found = datasets.load_dataset(self.name, self.config, split=self.split, streaming=streaming)
            yield from enumerate(found, 1)
        except Exception as error:  # of the library, of HTTP, of a file system, of a format: no common base class
            raise UserError(
                f"{self} cannot be read: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            ) from error
