"""Where documents come from: text files, JSON lines, Parquet, data sets of the Hugging Face Hub.

Everything is read piece by piece: what is in memory at a time does not grow with the corpus.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ictx.data.config import DataConfig
from ictx.errors import UserError

SKIPPED_FOLDERS = {"__pycache__", ".git"}
JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
# No colon: lists of paths are separated by them.
HUB = "hf="
# What says that a file holds no text that can be read; other errors of a disk are errors.
NO_TEXT = (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error, PermissionError, FileNotFoundError)


def source(name: str) -> Files | Hub:
    """Returns the source that a name means: `hf=NAME[,CONFIG[,SPLIT]]`, or else a path. Raises UserError."""
    if not name.startswith(HUB):
        path = Path(name)
        if not path.exists():
            raise UserError(f"corpus path {path} does not exist")
        return Files(path)
    parts = name[len(HUB) :].split(",")
    if not parts[0] or len(parts) > 3:
        raise UserError(f"corpus {name}: expected {HUB}NAME, {HUB}NAME,CONFIG or {HUB}NAME,CONFIG,SPLIT")
    dataset, config, split = [*parts, "", ""][:3]
    return Hub(dataset, config or None, split or "train")


@dataclass(frozen=True)
class Files:
    """A file, or all files below a folder in the order of their names."""

    path: Path

    def __str__(self) -> str:
        return f"corpus path {self.path}"

    def texts(self, config: DataConfig) -> Iterator[str]:
        """Yields the documents. Raises UserError naming a file that is damaged."""
        for file in [self.path] if self.path.is_file() else _below(self.path):
            try:
                yield from _read(file, config, named=file == self.path)
            except NO_TEXT as error:
                # A folder holds all sorts of things; a file that was asked for is meant.
                if file == self.path:
                    raise UserError(f"{self} cannot be read as text: {error}") from error
            except OSError as error:
                raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def _below(folder: Path) -> Iterator[Path]:
    """Yields regular files depth first: memory holds one folder's names at a time, not all."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in SKIPPED_FOLDERS:
                yield from _below(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield Path(entry.path)


def _read(file: Path, config: DataConfig, named: bool) -> Iterator[str]:
    """Yields the documents of a file.

    A file that was not named itself, but found below a folder, need not be what its name says: JSON lines of another
    kind are plain text then, and other tables are no text.
    """
    if file.name.endswith(JSON_LINES) and (named or _has_records(file, config.text_field)):
        yield from _json_lines(file, config.text_field)
    elif file.suffix == ".parquet":
        yield from _parquet(file, config.text_field, named)
    else:
        yield from _plain(file, config.longest_document)


def _open(file: Path) -> Any:
    """Opens a plain or gzipped text; ends of lines stay as they are."""
    opener = gzip.open if file.suffix == ".gz" else open
    return opener(file, "rt", encoding="utf-8", newline="")


def _plain(file: Path, longest: int) -> Iterator[str]:
    """Yields a text file in pieces of at most `longest` characters, up to the first NUL character."""
    with _open(file) as stream:
        while text := stream.read(longest):
            if "\0" in text:
                return
            yield text


def _record(line: str, field: str) -> str | None:
    """Returns the text in a line of JSON, or None."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    text = record.get(field) if isinstance(record, dict) else None
    return text if isinstance(text, str) else None


def _has_records(file: Path, field: str) -> bool:
    with _open(file) as stream:
        return _record(stream.readline(), field) is not None


def _json_lines(file: Path, field: str) -> Iterator[str]:
    with _open(file) as stream:
        try:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                text = _record(line, field)
                if text is None:
                    raise UserError(f"{file} line {number} is no JSON object with text in {field!r} (data.text_field)")
                yield text
        except NO_TEXT as error:
            raise UserError(f"{file} is damaged: {error}") from error


def _parquet(file: Path, field: str, named: bool) -> Iterator[str]:
    # Takes a while to import; few corpora need it.
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(file, pre_buffer=False) as table:
            column = table.schema_arrow.field(field) if field in table.schema_arrow.names else None
            if column is None or not (arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type)):
                if named:
                    raise UserError(f"{file} has no column {field!r} (data.text_field) of text")
                return
            for rows in table.iter_batches(batch_size=64, columns=[field]):
                yield from (text for text in rows.column(0).to_pylist() if text)
    except arrow.ArrowException as error:
        raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class Hub:
    """A data set by its name on the Hugging Face Hub, or a folder in any layout that `datasets` knows."""

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"data set {self.name}"

    def texts(self, config: DataConfig) -> Iterator[str]:
        """Yields the documents. Raises UserError naming the data set that cannot be had."""
        # Takes seconds to import; few corpora need it.
        import datasets

        try:
            rows = datasets.load_dataset(self.name, self.config, split=self.split, streaming=config.streaming)
            for row in rows:
                text = row.get(config.text_field)
                if not isinstance(text, str):
                    raise UserError(
                        f"{self} has no text in {config.text_field!r} (data.text_field): it has {', '.join(row)}"
                    )
                yield text
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # of the library, of HTTP, of a file system, of a format: whatever it is built on
            raise UserError(
                f"{self} cannot be read: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            ) from error
