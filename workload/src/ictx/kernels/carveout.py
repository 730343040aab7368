"""Sets how a multiprocessor divides its memory between the L1 cache and shared memory while a kernel runs."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

PREFERRED_CARVEOUT = 9
"""CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT of the CUDA driver: percent of shared memory, -1: default."""


def prefer_l1(launched: Any) -> None:
    """Gives a kernel the largest possible L1 cache, from its next launch on.

    By default the driver chooses: a launch that begins while a kernel with much shared memory runs gets that kernel's
    division, and the vector that its programs read repeatedly is evicted (2 to 6 % of a step on an H200).

    Args:
        launched: the return value of a launch: Triton's compiled kernel, or None if nothing was launched.
    """
    if launched is not None and launched.function:
        _prefer_l1(launched.function)


@functools.cache
def _prefer_l1(function: int) -> None:
    """Sets the attribute once. The status is not checked: the attribute is a hint that affects only speed."""
    _driver().cuFuncSetAttribute(ctypes.c_void_p(function), PREFERRED_CARVEOUT, 0)


@functools.cache
def _driver() -> ctypes.CDLL:
    """Returns the CUDA driver, which launched the kernel."""
    return ctypes.CDLL("libcuda.so.1")
