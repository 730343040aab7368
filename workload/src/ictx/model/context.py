"""What a model needs of the ranks among which its windows are shared out."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ictx.kernels.attention.packing import Packing


class Context(Protocol):
    """Ranks that hold consecutive parts of the same windows; `ictx.parallel.context` implements it."""

    @property
    def rank(self) -> int:
        """Place of this rank's tokens."""

    @property
    def count(self) -> int:
        """Ranks that share out a window."""

    def gather(self, x_bs: Tensor) -> Tensor:
        """Returns the columns of all ranks, (batch, window); without a gradient."""

    def own(self, x_bt: Tensor) -> Tensor:
        """Returns this rank's columns of those of a window."""

    def mean(self, x: Tensor) -> Tensor:
        """Returns the mean over the ranks; without a gradient."""

    def attend(self, q_bshd: Tensor, latent_bse: Tensor, weight: Tensor, scale: float, packing: Packing) -> Tensor:
        """Returns what this rank's queries attend to among the tokens of all, (batch, sequence, heads, value)."""
