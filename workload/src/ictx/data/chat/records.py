"""Records of files (JSON lines, a JSON list, Parquet; compressed or not), each with its location."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ictx.data.chat.forms import BadRow
from ictx.data.formats import COMPRESSED, JSON_LINES, PARQUET, PARQUET_BEGINS, decompressed
from ictx.data.skipped import Unreadable
from ictx.errors import UserError

SUFFIXES = (*JSON_LINES, ".json", PARQUET)
Record = tuple[str, Any]
"""A location such as `FILE line 3`, and the record there, or a BadRow if it cannot be read."""


def holds_records(file: Path) -> bool:
    """Returns whether a file found below a folder contains records, according to its name."""
    name = file.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return name.endswith(SUFFIXES)


def records(file: Path) -> Iterator[Record]:
    """Yields the records of a file; detects the format from its first bytes. Raises UserError if it is damaged."""
    try:
        with file.open("rb") as raw:
            parquet = raw.read(len(PARQUET_BEGINS)) == PARQUET_BEGINS
        if parquet:
            yield from _parquet(file)
            return
        with decompressed(file) as content:
            yield from _json(file, content)
    except Unreadable as error:
        raise UserError(f"{file} is {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def _json(file: Path, content: IO[bytes]) -> Iterator[Record]:
    for number, line in enumerate(content, 1):
        stripped = line.strip(b"\xef\xbb\xbf \t\r\n")
        if not stripped:
            continue
        if number == 1 and stripped.startswith(b"["):
            yield from _list(file, line + content.read())
            return
        yield f"{file} line {number}", _parsed(stripped)


def _list(file: Path, content: bytes) -> Iterator[Record]:
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8, from byte {error.start:,} on") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a JSON list: {str(error)[:100]}") from error
    for number, record in enumerate(found, 1):
        yield f"{file} element {number}", record


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except (ValueError, RecursionError) as error:
        return BadRow("no JSON", str(error)[:100])


def _parquet(file: Path) -> Iterator[Record]:
    # Slow to import, and rarely needed.
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        with parquet.ParquetFile(file, pre_buffer=False) as table:
            for batch in table.iter_batches(batch_size=64):
                # One row at a time: one that is not UTF-8 must not invalidate the others.
                for place in range(len(batch)):
                    number += 1
                    try:
                        (found,) = batch.slice(place, 1).to_pylist()
                    except UnicodeDecodeError:
                        found = BadRow("not UTF-8")
                    # Rows of a table have every column; null means that a field is missing.
                    given = found if isinstance(found, BadRow) else _given(found)
                    yield f"{file} row {number}", given
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}") from error


def _given(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if value is not None}
