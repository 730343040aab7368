"""How a model is spread over devices and what its backward keeps: sharding, recompute, compilation."""

from ictx.parallel.mesh import Layout
from ictx.parallel.parallelize import parallelize
from ictx.parallel.recompute import MODES

__all__ = ["MODES", "Layout", "parallelize"]
