"""How a multiprocessor divides its memory between the L1 cache and shared memory while a kernel runs."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

PREFERRED_CARVEOUT = 9
"""CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT of CUDA's driver: percent of shared memory, -1 for its choice."""


def prefer_l1(launched: Any) -> None:
    """Leaves a kernel as much L1 cache as there can be, from its next launch on.

    The driver chooses by itself until then: a launch that begins while a kernel with much shared memory runs gets that
    kernel's division, and loses the vector that its programs read again and again (2 to 6 % of a step on an H200).

    Args:
        launched: what a launch returned: Triton's compiled kernel, or None where nothing was launched.
    """
    if launched is not None and launched.function:
        _prefer_l1(launched.function)


@functools.cache
def _prefer_l1(function: int) -> None:
    """Sets the attribute once. It is a hint, without which a kernel is only slower: its result is not checked."""
    _driver().cuFuncSetAttribute(ctypes.c_void_p(function), PREFERRED_CARVEOUT, 0)


@functools.cache
def _driver() -> ctypes.CDLL:
    """Returns CUDA's driver, by which the kernel was launched."""
    return ctypes.CDLL("libcuda.so.1")
