"""Tuned configurations of `mla_attention` and `mla_prefill`, read from the versioned file, chosen without a search."""

from __future__ import annotations

import functools
from dataclasses import astuple, dataclass

from ictx.kernels import dispatch, tuned


@dataclass(frozen=True)
class Tiles:
    """How one kernel is cut up."""

    block_m: int
    """Queries of a tile."""
    block_n: int
    """Keys of a tile."""
    warps: int
    """Warps per program."""
    stages: int
    """Depth of the software pipeline."""
    tma: bool = False
    """Whether tiles are read through tensor descriptors (from sm_90 on)."""
    ahead: bool = False
    """Whether the forward kernel computes the next tile's scores beside the softmax of this one."""


@dataclass(frozen=True)
class AttentionConfig:
    """How the kernels of `mla_attention` are cut up."""

    forward: Tiles
    keys_values: Tiles
    queries: Tiles

    def numbers(self) -> list[int]:
        """Returns all values in a row, for an operation of PyTorch, which takes no classes."""
        return [int(value) for tiles in (self.forward, self.keys_values, self.queries) for value in astuple(tiles)]

    @classmethod
    def of_numbers(cls, numbers: list[int]) -> AttentionConfig:
        """Returns what `numbers` was called on."""
        kinds = [type(value) for value in astuple(INTERPRETER.forward)]
        return cls(
            *(
                Tiles(*(kind(value) for kind, value in zip(kinds, numbers[at : at + len(kinds)], strict=True)))
                for at in range(0, len(numbers), len(kinds))
            )
        )


INTERPRETER = AttentionConfig(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1))
"""What Triton's interpreter runs with."""


override: AttentionConfig | None = None
"""Stands for every tuned configuration in a process that tries another."""


def attention_config(cc: int) -> AttentionConfig:
    """Returns what the interpreter runs with, or what the newest target does that is not newer than `cc`."""
    return override or (INTERPRETER if dispatch.interpreted() else _tuned(cc))


@functools.cache
def _tuned(cc: int) -> AttentionConfig:
    """Returns the content of the file."""
    known = tuned.section("attention")
    targets = sorted(int(name.removeprefix("sm_")) for name in known)
    found = known[f"sm_{max((target for target in targets if target <= cc), default=targets[0])}"]
    return AttentionConfig(**{name: Tiles(**tiles) for name, tiles in found.items()})
