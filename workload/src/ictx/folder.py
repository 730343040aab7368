"""Folders that appear complete or not at all, and stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ictx.errors import UserError


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Yields an empty folder beside `directory` that takes its place, with what was written there safe on disk.

    An older `directory` goes. When the block raises, nothing of the new one stays and the older one is untouched; what
    a killed process left is removed by the next that writes the same folder.
    """
    draft, old = (directory.with_name(f"{directory.name}.{suffix}") for suffix in ("part", "old"))
    if old.exists() and not directory.exists():
        # Killed between the two renames below.
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
    """Makes a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there with all of its text, also after a power cut, or as it was before."""
    draft = path.with_name(f"{path.name}.part")
    draft.unlink(missing_ok=True)
    with draft.open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read_text(path: Path) -> str:
    """Returns a file's text. Raises UserError where it is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error
