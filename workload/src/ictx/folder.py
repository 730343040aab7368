"""Atomic, durable writes of folders and files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ictx.errors import UserError


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Yields an empty folder that is synced to disk and replaces `directory` when the block ends.

    If the block raises, the new folder is removed and `directory` stays unchanged. Remains of a killed process are
    removed by the next call for the same folder.
    """
    draft, old = (directory.with_name(f"{directory.name}.{suffix}") for suffix in ("part", "old"))
    if old.exists() and not directory.exists():
        # A process was killed between the two renames below.
        old.replace(directory)
    for left in (draft, old):
        shutil.rmtree(left, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
        for path in [*draft.rglob("*"), draft]:
            sync(path)
        if directory.exists():
            directory.replace(old)
        draft.replace(directory)
        sync(directory.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        if old.exists() and not directory.exists():
            old.replace(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Writes a file atomically: even after a power cut it has its old or its new content."""
    draft = path.with_name(f"{path.name}.part")
    draft.unlink(missing_ok=True)
    with draft.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read_text(path: Path) -> str:
    """Returns a file's text. Raises UserError if it is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error
