"""Inputs of the decode benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ictx.kernels import layout

HEADS = 16
PAGE = 64
SCALE = 192**-0.5


@dataclass
class Inputs:
    """Random queries and caches of one case, in several sets that together exceed the L2 cache."""

    queries: list[Tensor]
    caches: list[Tensor]
    plain: list[Tensor]
    """The caches before they are quantised."""
    table: Tensor
    lens: Tensor

    @property
    def context(self) -> int:
        """Cached tokens of each sequence."""
        return self.plain[0].shape[0] * PAGE // len(self.lens)

    @classmethod
    def make(
        cls, batch: int, context: int, stored: str | None, heads: int = HEADS, dtype: torch.dtype = torch.bfloat16
    ) -> Inputs:
        """Returns inputs with blocks of 64."""
        sets = 2 if batch * context * (layout.ROW_BYTES if stored else 2 * layout.ROW) > 10**8 else 8
        blocks = context // PAGE
        plain = [torch.randn(batch * blocks, PAGE, layout.ROW, dtype=dtype, device="cuda") for _ in range(sets)]
        return cls(
            [torch.randn(batch, 1, heads, layout.ROW, dtype=dtype, device="cuda") for _ in range(sets)],
            [layout.quantise(cache, stored) for cache in plain] if stored else plain,
            plain,
            torch.arange(batch * blocks, dtype=torch.int32, device="cuda").view(batch, blocks),
            torch.full((batch,), context, dtype=torch.int32, device="cuda"),
        )
