"""Interface of a model to context-parallel ranks, each of which holds a part of every window."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ictx.kernels.attention.packing import Packing


class Context(Protocol):
    """Ranks that hold consecutive parts of the same windows; `ictx.parallel.context` implements it."""

    @property
    def rank(self) -> int:
        """Index of this rank's part of a window."""

    @property
    def count(self) -> int:
        """Number of ranks per window."""

    def gather(self, x_bs: Tensor) -> Tensor:
        """Returns the columns of all ranks, (batch, window); without a gradient."""

    def own(self, x_bt: Tensor) -> Tensor:
        """Returns this rank's columns of a whole window."""

    def mean(self, x: Tensor) -> Tensor:
        """Returns the mean over the ranks; without a gradient."""

    def attend(self, q_bshd: Tensor, latent_bse: Tensor, weight: Tensor, scale: float, packing: Packing) -> Tensor:
        """Returns attention of this rank's queries to the tokens of all ranks, (batch, sequence, heads, value)."""
