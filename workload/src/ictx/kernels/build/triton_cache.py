"""Triton's cache, with kernels behind it that were compiled ahead of time.

Triton makes a `ShippedCache` for each kernel where TRITON_CACHE_MANAGER names it, as in our images: the folder that
ICTX_KERNEL_CACHE names is read, and what it lacks is compiled into Triton's own (TRITON_CACHE_DIR).
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
    """Returns the folder where it is what this process needs; logs once why it is not."""
    if not cache or not Path(cache).is_dir():
        return None
    now = state(Path(cache))
    if now != "fresh":
        logger.warning("%s=%s is not used, kernels are compiled: it is %s", VARIABLE, cache, now)
        return None
    return Path(cache)


class ShippedCache(FileCacheManager):  # type: ignore[misc]
    """Triton's cache of one kernel, with the shipped folder behind it, which is never written to."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        super().__init__(key, override, dump)
        folder = None if override or dump else _usable(os.environ.get(VARIABLE, ""))
        self._shipped = folder / key if folder else None

    def get_file(self, filename: str) -> str | None:
        """Returns the path of a file, Triton's own first."""
        found: str | None = super().get_file(filename)
        if found is None and self._shipped and (self._shipped / filename).exists():
            return str(self._shipped / filename)
        return found

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Returns the paths of the files that belong to one kernel, Triton's own first."""
        found: dict[str, str] | None = super().get_group(filename)
        if found is not None or not self._shipped:
            return found
        try:
            names = json.loads((self._shipped / f"__grp__{filename}").read_text("utf-8"))["child_paths"]
        except (OSError, ValueError, KeyError):
            return None
        # The paths in there are those of the build: the folder may have moved since, and holds what a launch needs.
        paths = {name: self._shipped / name for name in names if (self._shipped / name).exists()}
        complete = {path.suffix for path in paths.values()} >= set(KEPT)
        return {name: str(path) for name, path in paths.items()} if complete else None
