"""Checks of the ownership of prepared data.

Checksums beside the data detect damage, but the owner of the folder can replace both. Ownership is therefore checked
first: data must belong to the job's user, to root, or to an owner that the settings trust.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from ictx.data.contents import read_meta
from ictx.data.shards import META_FILE
from ictx.manifest import Entry, Unusable, check_owner


class Trusting(Protocol):
    """Settings of trusted owners."""

    @property
    def trusted_owners(self) -> tuple[int, ...]:
        """User ids, besides one's own and root's."""

    @property
    def trusted_dirs(self) -> tuple[Path, ...]:
        """Folders that are trusted regardless of their owner."""


def trusted_files(directory: Path, config: Trusting) -> dict[str, Entry]:
    """Returns the files of a folder of prepared data, without reading them.

    Raises Unusable unless all files belong to a trusted owner and only their owner can write to them. In a container,
    files of root and of all other users appear as nobody's: only `data.trusted_dirs` distinguishes them.
    """
    allowed = {0, *config.trusted_owners}
    if directory.exists() and directory.resolve() in [trusted.resolve() for trusted in config.trusted_dirs]:
        allowed.add(directory.stat().st_uid)

    def check(path: Path) -> None:
        try:
            check_owner(path, allowed)
        except Unusable as error:
            raise Unusable(f"{error} (data.trusted_owners, data.trusted_dirs)") from error

    # Before anything in it is read: there may be many large folders of others.
    if os.path.lexists(directory):
        check(directory)
    _, files = read_meta(directory)
    for name in (META_FILE, *files):
        check(directory / name)
    return files
