"""Parallel training: sharding, context parallelism, activation recompute, compilation."""

from ictx.parallel.mesh import Layout
from ictx.parallel.parallelize import parallelize
from ictx.parallel.recompute import MODES

__all__ = ["MODES", "Layout", "parallelize"]
