"""Tuned configurations of `mla_decode`, from the versioned file; no search at run time."""

from __future__ import annotations

from dataclasses import dataclass

from ictx.kernels import tuned


@dataclass(frozen=True)
class DecodeConfig:
    """Tiling and launch parameters of `mla_decode`."""

    block_n: int
    """Cached tokens per step."""
    warps: int
    """Warps per program."""
    stages: int
    """Depth of the software pipeline."""
    programs: int
    """Programs per multiprocessor."""
    reduce_all: bool = True
    """Whether all programs of a sequence join its partial results (all must be resident), or only the last."""
    registers: int = 0
    """Maximum registers per thread; 0: the compiler's choice."""
    scan: int = 128
    """Sequences whose lengths are read per step of the search for the first tile."""
    columns: int = 0
    """Columns of the result joined at once from up to 160 parts, 64 or 32; 0: the kernel's default."""
    parts: int = 256
    """Parts, of up to 160, that are joined at once: a power of two."""
    warpgroup: bool = False
    """Whether to use Hopper's warpgroup products (`warpgroup_triton`): for quantised caches, tiles of 64."""


CASES = ("", "short", "one")
"""Cases of a kind of input that may have a separate configuration: short caches, or one sequence."""


def decode_key(block_m: int, stored: str | None, fast: bool = False, case: str = "") -> str:
    """Returns the key of a kind of input in the file; GPUs with `fast` memory have separate keys."""
    return f"{stored or 'plain'}/rows{block_m}{'/fast' if fast else ''}{case and f'/{case}'}"


override: DecodeConfig | None = None
"""Replaces every tuned configuration in a process that tries a candidate."""


def decode_config(cc: int, block_m: int, stored: str | None, fast: bool = False, case: str = "") -> DecodeConfig:
    """Returns the configuration of the newest target not newer than compute capability `cc`.

    With `fast` memory (see `dispatch.fast_memory`), programs must overlap more of their work with loads. Configurations
    for fast memory and for CASES apply only to their own target: they may use instructions that newer targets lack.
    """
    if override is not None:
        return override
    section = tuned.section("decode")
    targets = sorted(int(name.removeprefix("sm_")) for name in section)
    target = max((known for known in targets if known <= cc), default=targets[0])
    kinds = section[f"sm_{target}"]
    own = [decode_key(block_m, stored, fast, case), decode_key(block_m, stored, fast)] if target == cc else []
    return DecodeConfig(**kinds[next((key for key in own if key in kinds), decode_key(block_m, stored))])
