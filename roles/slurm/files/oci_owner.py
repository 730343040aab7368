"""Who could change what a path names: what is run or believed must be root's or one's own, like the folders above."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def trusted(path: Path) -> Path:
    """Returns the path with its links followed.

    Raises:
        PermissionError: somebody else than root and this user owns it or a folder above it, or may write there.
        FileNotFoundError: it does not exist.
    """
    real = path.resolve(strict=True)
    for part in (real, *real.parents):
        about = part.stat()
        if about.st_uid not in (0, os.getuid()):
            raise PermissionError(f"{part} belongs to uid {about.st_uid}, not to root or uid {os.getuid()}")
        # In a folder with the sticky bit nobody replaces what is another's. A group with a user's number is his own.
        sticky = stat.S_ISDIR(about.st_mode) and about.st_mode & stat.S_ISVTX
        if not sticky and about.st_mode & stat.S_IWOTH:
            raise PermissionError(f"{part} can be written to by everybody")
        if not sticky and about.st_mode & stat.S_IWGRP and about.st_gid not in (0, os.getuid()):
            raise PermissionError(f"{part} can be written to by group {about.st_gid}")
    return real
