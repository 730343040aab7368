"""Checks that a path and its parent folders can be changed by root and the user only."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def trusted(path: Path) -> Path:
    """Returns the path with its links followed.

    Raises:
        PermissionError: another user owns it or a parent folder, or may write there.
        FileNotFoundError: it does not exist.
    """
    real = path.resolve(strict=True)
    for part in (real, *real.parents):
        about = part.stat()
        if about.st_uid not in (0, os.getuid()):
            raise PermissionError(f"{part} belongs to uid {about.st_uid}, not to root or uid {os.getuid()}")
        # In a folder with the sticky bit users cannot replace others' files. A group with the user's number is private.
        sticky = stat.S_ISDIR(about.st_mode) and about.st_mode & stat.S_ISVTX
        if not sticky and about.st_mode & stat.S_IWOTH:
            raise PermissionError(f"{part} is writable for everyone")
        if not sticky and about.st_mode & stat.S_IWGRP and about.st_gid not in (0, os.getuid()):
            raise PermissionError(f"{part} is writable for group {about.st_gid}")
    return real
