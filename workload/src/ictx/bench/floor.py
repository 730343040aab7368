"""What a decoded token must read at least, and how long that takes at a bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ictx.model.cache import bytes_per_token
from ictx.model.config import ModelConfig
from ictx.model.describe import active_parameters


@dataclass(frozen=True)
class Floor:
    """Bytes that one token of one sequence moves."""

    weights: int
    """Weights that the token is multiplied with, the head's too, and its own row of the embedding."""
    cache: int
    """Cached rows that it attends to, and the one that it adds."""

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.weights + self.cache

    def seconds(self, bandwidth: float) -> float:
        """Returns how long that takes at so many bytes per second."""
        return self.bytes / bandwidth


def floor_of(config: ModelConfig, context: int, dtype: torch.dtype, stored: str | None) -> Floor:
    """Returns the floor of a token that attends to `context` cached tokens, itself included.

    The embedding is a table: one row of it is read. Activations are not counted; they stay in the L2 cache.
    """
    weights = (active_parameters(config) + config.hidden_size) * dtype.itemsize
    return Floor(weights, (context + 1) * bytes_per_token(config, dtype, stored))
