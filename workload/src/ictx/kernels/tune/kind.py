"""One kind of input, or one kernel, to tune, and its candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kind:
    """One kind of input, or one kernel, with a separate configuration."""

    section: str
    """Section of the file of tuned configurations."""
    name: str
    current: Any
    """Its current configuration: measured first, and kept if no candidate is faster."""
    candidates: list[Any]
    fit: Callable[[Path, Any], bool]
    """Compiles a candidate into a folder, in a separate process; returns whether it passes the release checks."""
    prepare: Callable[[], Callable[[Any], float]]
    """Makes inputs; returns a function that measures a candidate, in seconds."""
