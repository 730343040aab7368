"""Tuned configurations of `mla_attention` and `mla_prefill`, from the versioned file; no search at run time."""

from __future__ import annotations

import functools
from dataclasses import astuple, dataclass

from ictx.kernels import dispatch, tuned


@dataclass(frozen=True)
class Tiles:
    """Tiling of one kernel."""

    block_m: int
    """Queries per tile."""
    block_n: int
    """Keys per tile."""
    warps: int
    """Warps per program."""
    stages: int
    """Depth of the software pipeline."""
    tma: bool = False
    """Whether tiles are read through tensor descriptors (from sm_90 on)."""
    ahead: bool = False
    """Whether the forward kernel computes the next tile's scores during the softmax of this one."""


@dataclass(frozen=True)
class AttentionConfig:
    """Tiling of the kernels of `mla_attention`."""

    forward: Tiles
    keys_values: Tiles
    queries: Tiles

    def numbers(self) -> list[int]:
        """Returns all values as one list, for a PyTorch operation, which accepts no classes."""
        return [int(value) for tiles in (self.forward, self.keys_values, self.queries) for value in astuple(tiles)]

    @classmethod
    def of_numbers(cls, numbers: list[int]) -> AttentionConfig:
        """Returns the configuration from the result of `numbers`."""
        kinds = [type(value) for value in astuple(INTERPRETER.forward)]
        return cls(
            *(
                Tiles(*(kind(value) for kind, value in zip(kinds, numbers[at : at + len(kinds)], strict=True)))
                for at in range(0, len(numbers), len(kinds))
            )
        )


INTERPRETER = AttentionConfig(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1))
"""Configuration for Triton's interpreter."""


override: AttentionConfig | None = None
"""Replaces every tuned configuration in a process that tries a candidate."""


def attention_config(cc: int) -> AttentionConfig:
    """Returns the interpreter's configuration, or that of the newest target not newer than `cc`."""
    return override or (INTERPRETER if dispatch.interpreted() else _tuned(cc))


@functools.cache
def _tuned(cc: int) -> AttentionConfig:
    """Returns the configuration from the file."""
    known = tuned.section("attention")
    targets = sorted(int(name.removeprefix("sm_")) for name in known)
    found = known[f"sm_{max((target for target in targets if target <= cc), default=targets[0])}"]
    return AttentionConfig(**{name: Tiles(**tiles) for name, tiles in found.items()})
