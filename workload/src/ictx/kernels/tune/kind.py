"""What is tuned: one kind of input, or one kernel, and its candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kind:
    """One kind of input, or one kernel, with a configuration of its own."""

    section: str
    """Of the file."""
    name: str
    current: Any
    """Its configuration so far: measured first, and kept where nothing is faster."""
    candidates: list[Any]
    fit: Callable[[Path, Any], bool]
    """Compiles a candidate into a folder, in a process of its own; whether it may ship."""
    prepare: Callable[[], Callable[[Any], float]]
    """Makes inputs; returns what measures a candidate, in seconds."""
