"""Triton's cache, with fallback to kernels compiled ahead of time.

If TRITON_CACHE_MANAGER names `ShippedCache`, as in our images, Triton creates one for each kernel: kernels are read
from the folder in ICTX_KERNEL_CACHE, and missing ones are compiled into Triton's cache (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path

from triton.runtime.cache import FileCacheManager

from ictx.kernels.build.shipped import KEPT, VARIABLE, state

logger = logging.getLogger(__name__)


@functools.cache
def _usable(cache: str) -> Path | None:
    """Returns the folder if it matches this process; otherwise logs the reason once and returns None."""
    if not cache or not Path(cache).is_dir():
        return None
    now = state(Path(cache))
    if now != "fresh":
        logger.warning("%s=%s is not used, kernels are compiled: it is %s", VARIABLE, cache, now)
        return None
    return Path(cache)


class ShippedCache(FileCacheManager):  # type: ignore[misc]
    """Triton's cache of one kernel, with the shipped folder as read-only fallback."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        super().__init__(key, override, dump)
        folder = None if override or dump else _usable(os.environ.get(VARIABLE, ""))
        self._shipped = folder / key if folder else None

    def get_file(self, filename: str) -> str | None:
        """Returns the path of a file, from Triton's cache first."""
        found: str | None = super().get_file(filename)
        if found is None and self._shipped and (self._shipped / filename).exists():
            return str(self._shipped / filename)
        return found

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Returns the paths of one kernel's files, from Triton's cache first."""
        found: dict[str, str] | None = super().get_group(filename)
        if found is not None or not self._shipped:
            return found
        try:
            names = json.loads((self._shipped / f"__grp__{filename}").read_text("utf-8"))["child_paths"]
        except (OSError, ValueError, KeyError):
            return None
        # The recorded paths are those of the build; the folder may have moved, and lacks intermediate files.
        paths = {name: self._shipped / name for name in names if (self._shipped / name).exists()}
        complete = {path.suffix for path in paths.values()} >= set(KEPT)
        return {name: str(path) for name, path in paths.items()} if complete else None
