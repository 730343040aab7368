"""Tuned configurations of `mla_decode`: read from a versioned file, chosen without a search."""

from __future__ import annotations

from dataclasses import dataclass

from ictx.kernels import tuned


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
    """Columns of the result that are joined at once out of up to 160 parts, 64 or 32; 0 leaves it to the kernel."""
    parts: int = 256
    """Parts, of up to 160, that are joined at once: a power of two."""
    warpgroup: bool = False
    """Whether tokens are rows of Hopper's own products (`warpgroup_triton`): for quantised caches, tiles of 64."""


CASES = ("", "short", "one")
"""Inputs of a kind that may have a configuration of their own: short caches, or one sequence."""


def decode_key(block_m: int, stored: str | None, fast: bool = False, case: str = "") -> str:
    """Returns the name under which the file holds a kind of input, on cards of `fast` memory one of its own."""
    return f"{stored or 'plain'}/rows{block_m}{'/fast' if fast else ''}{case and f'/{case}'}"


override: DecodeConfig | None = None
"""Stands for every tuned configuration in a process that tries another."""


def decode_config(cc: int, block_m: int, stored: str | None, fast: bool = False, case: str = "") -> DecodeConfig:
    """Returns the configuration of the newest target that is not newer than compute capability `cc`.

    Where memory is `fast` (see `dispatch.fast_memory`), programs must overlap more of their own work with it. What was
    found for such cards is theirs alone: the instructions that it takes may be missing on a newer target. So is what
    was found for one of CASES.
    """
    if override is not None:
        return override
    section = tuned.section("decode")
    targets = sorted(int(name.removeprefix("sm_")) for name in section)
    target = max((known for known in targets if known <= cc), default=targets[0])
    kinds = section[f"sm_{target}"]
    own = [decode_key(block_m, stored, fast, case), decode_key(block_m, stored, fast)] if target == cc else []
    return DecodeConfig(**kinds[next((key for key in own if key in kinds), decode_key(block_m, stored))])
