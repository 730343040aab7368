"""The file of tuned configurations, and of libraries measured to be faster than our kernels, by section."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("tuned.json")


@functools.cache
def section(name: str) -> dict[str, dict[str, Any]]:
    """Returns a section of the file."""
    content: dict[str, dict[str, dict[str, Any]]] = json.loads(FILE.read_text("utf-8"))
    return content[name]


def save(cc: int, found: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Writes the file to `out`, updated with the configurations `found` for one target, by section."""
    content = json.loads(FILE.read_text("utf-8"))
    for name, configs in found.items():
        targets = content[name]
        if f"sm_{cc}" not in targets:
            # A new target needs an entry for every kind of input: copy those of the target that was used until now.
            older = [int(known.removeprefix("sm_")) for known in targets if int(known.removeprefix("sm_")) <= cc]
            targets[f"sm_{cc}"] = dict(targets[f"sm_{max(older)}"]) if older else {}
        targets[f"sm_{cc}"].update({key: asdict(config) for key, config in configs.items()})
    out.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
    section.cache_clear()
