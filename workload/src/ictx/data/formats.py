"""Documents in a file: plain text, JSON lines, Parquet; text may be compressed.

The compression is detected from a file's first bytes, the format from its name. If the name has no suffix (a pipe, a
blob in the Hugging Face cache), the format is detected from the first bytes too.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

from ictx.data.config import DataConfig
from ictx.data.skipped import Skipped, Unreadable
from ictx.errors import UserError

JSON_LINES = (".jsonl", ".ndjson")
PARQUET, PARQUET_BEGINS = ".parquet", b"PAR1"
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Maximum characters of a first line that is parsed to detect records.
LONGEST_GUESS = 1 << 24


def _zstd(file: IO[bytes]) -> Any:
    # Slow to import, and few corpora need it.
    import pyarrow as arrow

    return arrow.CompressedInputStream(file, "zstd")


DECOMPRESS: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": _zstd,
}


def read(file: Path, config: DataConfig, skipped: Skipped, named: bool) -> Iterator[str]:
    """Yields the documents of a file.

    Args:
        named: whether the file was named explicitly, not found below a folder.

    Raises Unreadable if it contains no text, and UserError for damaged text or records without text.
    """
    try:
        kind = _kind(file, config.text_field, named)
        if kind == "parquet":
            yield from _parquet(file, config.text_field, skipped)
        elif kind == "lines":
            yield from _json_lines(file, config.text_field)
        else:
            yield from _plain(file, config.longest_document)
    except (PermissionError, FileNotFoundError) as error:
        raise Unreadable(f"cannot be opened: {error.strerror}") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


def _kind(file: Path, field: str, named: bool) -> str:
    name = file.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    if name.endswith((PARQUET, *JSON_LINES)):
        return "parquet" if name.endswith(PARQUET) else "lines"
    if "." in name:
        return "plain"
    with file.open("rb") as raw:
        if raw.read(len(PARQUET_BEGINS)) == PARQUET_BEGINS:
            return "parquet"
    try:
        with _opened(file) as stream:
            record = _record(next(_lines(stream), ""))
    except (Unreadable, UnicodeDecodeError):
        return "plain"
    # In an explicitly named file, a missing field is an error, not a reason to read it as plain text.
    return "lines" if isinstance(record, dict) and (named or isinstance(record.get(field), str)) else "plain"


@contextmanager
def _opened(file: Path) -> Iterator[TextIO]:
    """Opens a text, compressed or not; line ends are unchanged. Raises Unreadable if it is damaged."""
    with decompressed(file) as content:
        yield io.TextIOWrapper(content, encoding="utf-8-sig", newline="")


@contextmanager
def decompressed(file: Path) -> Iterator[IO[bytes]]:
    """Opens a file, compressed or not. Raises Unreadable if it is damaged."""
    with file.open("rb") as raw:
        begins = raw.peek(8)
        opener = next((opener for magic, opener in DECOMPRESS.items() if begins.startswith(magic)), None)
        try:
            with opener(raw) if opener else raw as content:
                yield content
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise Unreadable(f"damaged: {error}") from error
        except OSError as error:
            # Errors of a file system have a number, those of a decompressor have none.
            if error.errno is not None:
                raise
            raise Unreadable(f"damaged: {error}") from error


def _plain(file: Path, longest: int) -> Iterator[str]:
    """Yields a text in pieces of at most `longest` characters."""
    length = 0
    try:
        with _opened(file) as stream:
            while text := stream.read(longest):
                if "\0" in text:
                    raise Unreadable("binary")
                length += len(text)
                yield text
    except (Unreadable, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise Unreadable(f"{reason}, from character {length:,} on" if length else reason) from error


def _lines(stream: TextIO) -> Iterator[str]:
    """Yields the lines that are not blank, without the byte order marks that concatenated files contain."""
    while line := stream.readline(LONGEST_GUESS):
        if line := line.strip("\ufeff \t\r\n"):
            yield line


def _record(line: str) -> Any:
    """Returns the value of a line of JSON, or None if it is invalid."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _json_lines(file: Path, field: str) -> Iterator[str]:
    number = 0
    try:
        with _opened(file) as stream:
            for number, line in enumerate(stream, 1):
                if not (line := line.strip("\ufeff \t\r\n")):
                    continue
                record = _record(line)
                text = record.get(field) if isinstance(record, dict) else None
                if not isinstance(text, str):
                    raise UserError(
                        f"{file} line {number} is not a JSON object with text in {field!r} (data.text_field)"
                    )
                yield text
    except (Unreadable, UnicodeDecodeError) as error:
        raise UserError(f"{file} is damaged: after line {number}: {error}") from error


def _parquet(file: Path, field: str, skipped: Skipped) -> Iterator[str]:
    # Slow to import, and few corpora need it.
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    empty = broken = 0
    try:
        with parquet.ParquetFile(file, pre_buffer=False) as table:
            schema = table.schema_arrow
            kind = schema.field(field).type if field in schema.names else arrow.null()
            kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
            if kind not in (arrow.string(), arrow.large_string(), arrow.string_view()):
                raise Unreadable(f"no column {field!r} of text (data.text_field)")
            for rows in table.iter_batches(batch_size=64, columns=[field]):
                # As bytes: one string that is not UTF-8 must not invalidate the others.
                for content in rows.column(0).cast(arrow.large_binary()).to_pylist():
                    if not content:
                        empty += 1
                        continue
                    try:
                        text = content.decode()
                    except UnicodeDecodeError:
                        broken += 1
                        continue
                    yield text
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}") from error
    skipped.add(file, "row", "without text", empty)
    skipped.add(file, "row", "not UTF-8", broken)
