"""Lower bound (floor) of the memory traffic of a decoded token, and of its time at a bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ictx.model.cache import bytes_per_token
from ictx.model.config import ModelConfig
from ictx.model.describe import active_parameters


@dataclass(frozen=True)
class Floor:
    """Bytes that one token of one sequence moves at least."""

    weights: int
    """Bytes of the weights that the token is multiplied with, including the head's, and of its row of the embedding."""
    cache: int
    """Bytes of the cached rows that it attends to, and of the one that it adds."""

    @property
    def bytes(self) -> int:
        """Total bytes."""
        return self.weights + self.cache

    def seconds(self, bandwidth: float) -> float:
        """Returns the seconds at `bandwidth` bytes per second."""
        return self.bytes / bandwidth


def floor_of(config: ModelConfig, context: int, dtype: torch.dtype, stored: str | None) -> Floor:
    """Returns the floor of a token that attends to `context` cached tokens, itself included.

    Only one row of the embedding is read. Activations are not counted, because they stay in the L2 cache.
    """
    weights = (active_parameters(config) + config.hidden_size) * dtype.itemsize
    return Floor(weights, (context + 1) * bytes_per_token(config, dtype, stored))
