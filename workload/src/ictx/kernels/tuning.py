"""Tuned configurations: read from a versioned file, chosen without a search."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class DecodeConfig:
    """How `mla_decode` is cut up."""

    block_n: int
    """Cached tokens per step."""
    warps: int
    """Warps per program."""
    stages: int
    """Depth of the software pipeline."""
    programs: int
    """Programs per multiprocessor."""
    reduce_all: bool = True
    """Whether all programs of a sequence join its partial results (needs all of them resident), or the last alone."""
    registers: int = 0
    """Most registers of a thread; 0 leaves it to the compiler."""
    scan: int = 128
    """Sequences whose lengths are read at once in the search for the first tile."""
    columns: int = 0
    """Columns of the result that are joined at once; 0 leaves it to the kernel."""


@functools.cache
def table() -> dict[str, dict[str, dict[str, int | bool]]]:
    """Returns the file's `decode` section: target, then kind of input, then configuration."""
    content: dict[str, dict[str, dict[str, dict[str, int | bool]]]] = json.loads(FILE.read_text("utf-8"))
    return content["decode"]


def decode_key(block_m: int, stored: str | None) -> str:
    """Returns the name under which the file holds a kind of input."""
    return f"{stored or 'plain'}/rows{block_m}"


override: DecodeConfig | None = None
"""Stands for every tuned configuration in a process that tries another."""


def decode_config(cc: int, block_m: int, stored: str | None) -> DecodeConfig:
    """Returns the configuration of the newest target that is not newer than compute capability `cc`."""
    if override is not None:
        return override
    targets = sorted(int(name.removeprefix("sm_")) for name in table())
    target = max((known for known in targets if known <= cc), default=targets[0])
    return DecodeConfig(**table()[f"sm_{target}"][decode_key(block_m, stored)])  # type: ignore[arg-type]


def save(cc: int, found: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """Writes the file to `out`, with found configurations of one target in its sections."""
    content = json.loads(FILE.read_text("utf-8"))
    for name, configs in found.items():
        section = content[name]
        if f"sm_{cc}" not in section:
            # A target of its own needs every kind of input: what was not found stays as it was chosen before.
            older = [int(known.removeprefix("sm_")) for known in section if int(known.removeprefix("sm_")) <= cc]
            section[f"sm_{cc}"] = dict(section[f"sm_{max(older)}"]) if older else {}
        section[f"sm_{cc}"].update({key: asdict(config) for key, config in configs.items()})
    out.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
    table.cache_clear()
