"""Operands and hazards of `wgmma`, the products of a group of four warps, for the PTX interpreter in `ptx`.

These products are asynchronous. It is an error to use a result or to overwrite an operand before the wait for the
product, and to write registers or shared memory before the product without a fence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
DEPTH = 16
"""Columns of the left operand, with 16-bit elements."""
WIDTH = {1: 128, 2: 64, 3: 32}
"""Bytes per row of a pattern of eight rows, by the descriptor's swizzling mode."""


def places(descriptor: int, count: int, transposed: bool) -> Array:
    """Returns the byte indices in shared memory of a descriptor's matrix [count, DEPTH]: [count, DEPTH, 2].

    A pattern has 8 rows of at least DEPTH columns, or, transposed, 8 columns of as many rows. Its 16-byte pieces are
    permuted by the address bits from 7 on.
    """
    start, leading, stride = (16 * (descriptor >> bit & 0x3FFF) for bit in (0, 16, 32))
    width = WIDTH[descriptor >> 62]
    assert descriptor >> 49 & 7 == 0, "the pattern must be aligned"
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
    """Registers and bytes in use by products without a wait, and registers that need a fence, of some warps.

    Products are counted in groups, each ended by `commit_group`.
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
        """Records a product, which may accumulate into the results of the previous one."""
        for name in (*results, *operands):
            assert name not in self.unfenced, f"{name} is written without wgmma.fence before its product"
        for name in operands:
            assert self.results.get(name, 0) <= self.ended, f"{name} is used before its product is waited for"
        self.results |= dict.fromkeys(results, self.group)
        self.operands |= dict.fromkeys(operands, self.group)
        for index in read:
            assert not self.unseen[index].any(), "shared memory is written without fence.proxy.async before its product"
            self.read[index] = self.group

    def wait(self, left: int) -> None:
        """Ends all committed groups except the latest `left`."""
        self.ended = max(self.ended, self.group - 1 - left)

    def uses(self, name: str) -> None:
        """Asserts that no pending product writes a register."""
        assert self.results.get(name, 0) <= self.ended, f"{name} is read before its product is waited for"

    def writes(self, name: str) -> None:
        """Asserts that no pending product reads or writes a register."""
        self.uses(name)
        assert self.operands.get(name, 0) <= self.ended, f"{name} is written while a product may still read it"
        self.unfenced.add(name)

    def stores(self, index: Array) -> None:
        """Asserts that no pending product reads these bytes of shared memory."""
        assert (self.read[index] <= self.ended).all(), "shared memory is written while a product may still read it"
        self.unseen[index] = True
