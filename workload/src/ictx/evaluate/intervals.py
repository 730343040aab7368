"""Confidence intervals of means and shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 10_000


class Interval(NamedTuple):
    """A mean and the bounds of its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> Interval:
    """Returns the weighted mean and its 95 % percentile bootstrap interval (Efron 1979). Raises ValueError if empty."""
    x = np.asarray(values, dtype=np.float64)
    if not len(x):
        raise ValueError("no values: expected one or more")
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = []
    # Draws in chunks of about 4 million numbers, to bound memory use.
    for count in np.diff([*range(0, DRAWS, max((1 << 22) // len(x), 1)), DRAWS]):
        drawn = generator.integers(len(x), size=(count, len(x)))
        means.append((x[drawn] * w[drawn]).sum(1) / w[drawn].sum(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float((x * w).sum() / w.sum()), float(low), float(high))


def wilson(share: float, count: int) -> Interval:
    """Returns a share of `count` and its 95 % score interval (Wilson 1927), valid also for few samples and 0 or 1."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(share, middle - half, middle + half)
