"""What the products of a group of four warps, `wgmma`, read and when: for `ptx`, which runs a kernel's PTX on the CPU.

They run beside the instructions behind them. A result that is used, and an operand that is overwritten, before it was
waited for is an error here, as are registers and shared memory that were written without a fence before the product.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
DEPTH = 16
"""Columns of the left operand, of 16 bits."""
WIDTH = {1: 128, 2: 64, 3: 32}
"""Bytes of a row of eight, by the descriptor's swizzling mode."""


def places(descriptor: int, count: int, transposed: bool) -> Array:
    """Returns the bytes in shared memory of a matrix [count, DEPTH] that a descriptor names: [count, DEPTH, 2].

    Rows of eight make a pattern: 8 rows of DEPTH and more columns, or, transposed, 8 columns of so many rows. 16-byte
    pieces are permuted within it, by the address's bits from 7 on.
    """
    start, leading, stride = (16 * (descriptor >> bit & 0x3FFF) for bit in (0, 16, 32))
    width = WIDTH[descriptor >> 62]
    assert descriptor >> 49 & 7 == 0, "the pattern begins at its alignment"
    row, column = np.arange(count)[:, None], np.arange(DEPTH)[None, :]
    if transposed:
        at = row % (width // 2) * 2 + row // (width // 2) * leading + column % 8 * width + column // 8 * stride
    else:
        at = row // 8 * stride + row % 8 * width + column * 2
    at += start
    at ^= (at >> 7 & width // 16 - 1) << 4
    return at[..., None] + np.arange(2)


@dataclass
class InFlight:
    """Which registers and bytes the products of some warps use that have not been waited for, and what lacks a fence.

    Products are counted by groups, each of which `commit_group` ends.
    """

    shared: int
    """Bytes of shared memory."""
    group: int = 1
    ended: int = 0
    results: dict[str, int] = field(default_factory=dict)
    operands: dict[str, int] = field(default_factory=dict)
    unfenced: set[str] = field(default_factory=set)
    """Registers that other instructions wrote since the last `wgmma.fence`."""

    def __post_init__(self) -> None:
        self.read = np.zeros(self.shared, np.int64)
        self.unseen = np.zeros(self.shared, np.bool_)

    def begin(self, results: Iterable[str], operands: Iterable[str], read: Iterable[Array]) -> None:
        """Notes a product; its results may be those of the one before it."""
        for name in (*results, *operands):
            assert name not in self.unfenced, f"{name} is written without wgmma.fence before its product"
        for name in operands:
            assert self.results.get(name, 0) <= self.ended, f"{name} is not there yet"
        self.results |= dict.fromkeys(results, self.group)
        self.operands |= dict.fromkeys(operands, self.group)
        for index in read:
            assert not self.unseen[index].any(), "shared memory is written without fence.proxy.async before its product"
            self.read[index] = self.group

    def wait(self, left: int) -> None:
        """Ends all committed groups but the latest `left`."""
        self.ended = max(self.ended, self.group - 1 - left)

    def uses(self, name: str) -> None:
        """Refuses to read a register that a product will write."""
        assert self.results.get(name, 0) <= self.ended, f"{name} is read before its product is waited for"

    def writes(self, name: str) -> None:
        """Refuses to write a register that a product uses."""
        self.uses(name)
        assert self.operands.get(name, 0) <= self.ended, f"{name} is written while a product may still read it"
        self.unfenced.add(name)

    def stores(self, index: Array) -> None:
        """Refuses to write bytes of shared memory that a product reads."""
        assert (self.read[index] <= self.ended).all(), "shared memory is written while a product may still read it"
        self.unseen[index] = True
