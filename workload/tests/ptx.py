"""Interprets a kernel's PTX on the CPU, to test kernels for GPUs that are not available.

It implements the instructions that Triton generates for our kernels, as the PTX ISA defines them; any other is an
error. The threads of a program execute each instruction together, or warp by warp from barrier to barrier, in an order
that is reversed at each barrier, which reveals missing barriers. Programs that wait for each other alternate. Memory
consists of the tensors passed to the kernel; an access outside of them is an error.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ptx_warpgroup import DEPTH, InFlight, places

Array = np.ndarray[Any, Any]
Place = tuple[int, int, int]
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
KINDS = {
    "b8": np.uint8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "b32": np.uint32,
    "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "f64": np.float64, "pred": np.bool_,
}  # fmt: skip
WIDER = {np.uint16: np.uint32, np.int16: np.int32, np.uint32: np.uint64, np.int32: np.int64}
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "neu": np.not_equal, "leu": lambda a, b: ~(a > b),
}  # fmt: skip
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
"""An operand: separated by commas, except those within a vector's braces or an address."""
POISON = 0xFF
"""Fills shared memory, so that a value that was never written is NaN."""


@dataclass(frozen=True)
class Statement:
    """An instruction: `@guard opcode operands`."""

    guard: str
    opcode: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """The instructions of a kernel, the positions of its labels, and the number of threads."""

    statements: tuple[Statement, ...]
    labels: Mapping[str, int]
    threads: int

    @classmethod
    def parse(cls, text: str) -> Program:
        """Parses the text of one kernel."""
        threads = re.search(r"\.reqntid (\d+)", text)
        assert threads
        body = text[text.index("\n{\n") + 3 : text.index("\n}\n")]
        statements: list[Statement] = []
        labels = {}
        for line in (line.split("//")[0].strip() for line in body.splitlines()):
            if label := re.fullmatch(r"(\$\w+):", line):
                labels[label[1]] = len(statements)
                continue
            # An inline block declares its own registers.
            inner = line[1:-1] if line.startswith("{ .reg") else line
            for part in filter(None, (part.strip() for part in inner.split(";"))):
                if not part.startswith("."):
                    found = re.fullmatch(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*)", part)
                    assert found, part
                    statements.append(Statement(found[1] or "", found[2], tuple(OPERAND.findall(found[3]))))
        return cls(tuple(statements), labels, int(threads[1]))


def _integer(text: str) -> int:
    return int(text.removesuffix("U"), 0)


@dataclass
class Memory:
    """The tensors that a kernel may access, by their addresses."""

    buffers: Sequence[tuple[int, Array]]

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Memory:
        """Returns the storage of the tensors, to which the kernel writes."""
        storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        every = torch.empty(0, dtype=torch.uint8)
        return cls([(address, every.new().set_(storage).numpy()) for address, storage in storages.items()])

    def at(self, addresses: Array, size: int) -> tuple[Array, Array]:
        """Returns the buffer that contains all addresses, and the indices of their bytes [addresses, size]."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        for start, content in self.buffers:
            if start <= low and high <= start + content.size:
                assert not (addresses % np.uint64(size)).any(), f"not aligned to {size} bytes"
                return content, (addresses - np.uint64(start)).astype(np.int64)[:, None] + np.arange(size)
        raise IndexError(f"bytes {low:#x} to {high:#x} are outside of all tensors")


class Threads:
    """Whole warps of threads that execute each instruction together; each register is an array over the threads."""

    def __init__(
        self, program: Program, memory: Memory, shared: Array, numbers: Array, place: Place, grid: Place,
        arguments: Sequence[Any],
    ) -> None:  # fmt: skip
        self.program, self.memory, self.shared, self.threads = program, memory, shared, len(numbers)
        thread, every = numbers.astype(np.uint32), np.ones(len(numbers), np.uint32)
        self.registers: dict[str, Array] = {"%tid.x": thread, "global_smem": every * np.uint32(0)}
        for axis, at, size in zip("xyz", place, grid, strict=True):
            self.registers |= {f"%ctaid.{axis}": every * np.uint32(at), f"%nctaid.{axis}": every * np.uint32(size)}
        self.arguments, self.lane = arguments, (thread % 32).astype(np.int64)
        self.all = np.ones(self.threads, np.bool_)
        self.touched = False
        self.products = InFlight(shared.size)

    def run(self) -> Iterator[str]:
        """Runs to the end; yields "turn" where other programs must continue, and "barrier" at barriers."""
        at = 0
        while True:
            statement = self.program.statements[at]
            at += 1
            active = self._guard(statement.guard)
            name = statement.opcode.split(".")[0]
            if name == "ret":
                return
            if name == "bra":
                assert active.all() or not active.any(), f"threads diverge at {statement}"
                if active.all():
                    at = self.program.labels[statement.operands[0]]
                continue
            if name == "atom" or ".acquire" in statement.opcode:
                yield "turn"
            if name == "bar":
                assert statement.opcode == "bar.sync" and statement.operands == ("0",), statement
                yield "barrier"
                continue
            action: Callable[[Statement, Array], None] | None = getattr(self, f"do_{name}", None)
            assert action, f"instruction is not implemented: {statement}"
            action(statement, active)

    def _guard(self, guard: str) -> Array:
        if not guard:
            return self.all
        value = self.registers[guard.removeprefix("!")]
        return ~value if guard.startswith("!") else value

    # Operands

    def get(self, operand: str, kind: type) -> Array:
        """Returns an operand's value as an array of the type `kind`."""
        self.products.uses(operand)
        if operand.startswith("%") and operand not in self.registers:
            # None of these threads has written the register.
            return np.full(self.threads, -1, f"i{np.dtype(kind).itemsize}").view(kind)
        if operand in self.registers:
            value = self.registers[operand]
            if value.dtype == np.bool_ or kind == np.bool_:
                return value.astype(kind)
            size = np.dtype(kind).itemsize
            return (value if value.itemsize == size else value.astype(RAW[size])).view(kind)
        if real := re.fullmatch(r"0f([0-9A-F]{8})", operand):
            bits = np.uint32(int(real[1], 16))
            return np.full(self.threads, bits).view(kind)
        number = _integer(operand)
        if kind == np.bool_:
            return np.full(self.threads, number != 0)
        size = np.dtype(kind).itemsize
        return np.full(self.threads, number & (2 ** (8 * size) - 1), RAW[size]).view(kind)

    def put(self, name: str, value: Array, active: Array) -> None:
        """Writes a register of the active threads."""
        if name == "_":
            return
        self.products.writes(name)
        self._put(name, value, active)

    def _put(self, name: str, value: Array, active: Array) -> None:
        value = value if value.dtype == np.bool_ else np.ascontiguousarray(value).view(RAW[value.itemsize])
        if not active.all():
            old = self.registers.get(name, np.zeros(self.threads, value.dtype))
            value = np.where(active, value, old)
        self.registers[name] = value

    def names(self, operand: str) -> list[str]:
        """Returns the registers of an operand, which may be a vector."""
        return [name.strip() for name in operand.strip("{}").split(",")]

    def address(self, operand: str) -> Array:
        """Returns the address of an operand [register + constant]."""
        base, _, offset = operand.strip("[] ").partition("+")
        base = base.strip()
        value = self.registers[base]
        return value + value.dtype.type(_integer(offset or "0") & (2 ** (8 * value.itemsize) - 1))

    # Moves

    def do_ld(self, statement: Statement, active: Array) -> None:
        parts = statement.opcode.split(".")
        kind, names = KINDS[parts[-1]], self.names(statement.operands[0])
        if "param" in parts:
            index = int(statement.operands[1].strip("[]").rsplit("_", 1)[1])
            value = self.arguments[index]
            bits = np.float32(value).view(np.uint32) if isinstance(value, float) else value
            size = np.dtype(kind).itemsize
            self.put(names[0], np.full(self.threads, int(bits) & (2 ** (8 * size) - 1), RAW[size]), self.all)
            return
        if active.any():
            size = np.dtype(kind).itemsize
            content, index = self._place("shared" in parts, statement.operands[1], active, size * len(names))
            values = np.zeros((self.threads, size * len(names)), np.uint8)
            values[active] = content[index]
            columns = values.view(RAW[size])
            for column, name in enumerate(names):
                # A 16-bit or 8-bit value may be loaded into a wider register.
                self.put(name, columns[:, column], active)

    def do_st(self, statement: Statement, active: Array) -> None:
        parts = statement.opcode.split(".")
        kind, names = KINDS[parts[-1]], self.names(statement.operands[1])
        if active.any():
            size = np.dtype(kind).itemsize
            content, index = self._place("shared" in parts, statement.operands[0], active, size * len(names))
            if "shared" in parts:
                self.products.stores(index)
            columns = np.stack([self.get(name, RAW[size]) for name in names], 1)
            content[index] = columns[active].view(np.uint8)

    def _place(self, shared: bool, operand: str, active: Array, size: int) -> tuple[Array, Array]:
        addresses = self.address(operand)[active]
        if not shared:
            self.touched = True
            return self.memory.at(addresses, size)
        assert not (addresses % np.uint32(size)).any(), f"not aligned to {size} bytes"
        index = addresses.astype(np.int64)[:, None] + np.arange(size)
        if index.max() >= self.shared.size:
            raise IndexError(f"byte {index.max()} of {self.shared.size} of shared memory")
        return self.shared, index

    def do_griddepcontrol(self, statement: Statement, active: Array) -> None:
        # Launches are serial here. Results of the previous launch must not be accessed before the wait for it.
        if statement.opcode == "griddepcontrol.launch_dependents":
            return
        assert statement.opcode == "griddepcontrol.wait", statement
        assert not self.touched, "memory is accessed before the wait for the previous launch"

    def do_atom(self, statement: Statement, active: Array) -> None:
        assert statement.opcode.endswith(".add.u32"), statement
        target, place, amount = statement.operands
        amounts = self.get(amount, np.uint32)
        old = np.zeros(self.threads, np.uint32)
        for thread in np.flatnonzero(active):
            content, index = self.memory.at(self.address(place)[thread : thread + 1], 4)
            old[thread] = content[index].view(np.uint32)[0, 0]
            content[index] = (old[thread : thread + 1] + amounts[thread]).view(np.uint8)
        self.put(target, old, active)

    def do_mov(self, statement: Statement, active: Array) -> None:
        kind = KINDS[statement.opcode.split(".")[-1]]
        target, source = statement.operands
        if source.startswith("{"):
            low, high = (self.get(name, np.uint16).astype(np.uint32) for name in self.names(source))
            self.put(target, low | high << np.uint32(16), active)
        elif target.startswith("{"):
            value = self.get(source, np.uint32)
            for name, part in zip(self.names(target), (value & np.uint32(0xFFFF), value >> np.uint32(16)), strict=True):
                self.put(name, part.astype(np.uint16), active)
        else:
            self.put(target, self.get(source, kind), active)

    def do_selp(self, statement: Statement, active: Array) -> None:
        kind = KINDS[statement.opcode.split(".")[-1]]
        target, yes, no, chosen = statement.operands
        self.put(target, np.where(self.registers[chosen], self.get(yes, kind), self.get(no, kind)), active)

    def do_setp(self, statement: Statement, active: Array) -> None:
        _, how, *_, name = statement.opcode.split(".")
        target, first, second = statement.operands
        kind = KINDS[name]
        self.put(target, COMPARE[how](self.get(first, kind), self.get(second, kind)), active)

    def do_cvt(self, statement: Statement, active: Array) -> None:
        *_, to, since = statement.opcode.split(".")
        if since == "e4m3x2":
            target, source = statement.operands
            pair = torch.from_numpy(self.get(source, np.uint16).view(np.uint8).copy()).view(torch.float8_e4m3fn)
            self.put(target, pair.to(torch.float16).numpy().view(np.uint32), active)
            return
        if to == "f16x2":
            target, *halves = statement.operands
            high, low = (self.get(half, np.float32).astype(np.float16).view(np.uint16) for half in halves)
            self.put(target, low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16), active)
            return
        value = self.get(statement.operands[1], KINDS[since])
        with np.errstate(over="ignore"):
            self.put(statement.operands[0], value.astype(KINDS[to]), active)

    # Between the threads of a warp

    def do_shfl(self, statement: Statement, active: Array) -> None:
        _, _, mode, _ = statement.opcode.split(".")
        target, source, by, bound, _ = statement.operands
        amount, limit = self.get(by, np.int32).astype(np.int64), int(bound)
        others = {"bfly": self.lane ^ amount, "up": self.lane - amount, "down": self.lane + amount, "idx": amount & 31}
        other = others[mode]
        outside = other < limit if mode == "up" else other > limit
        other = np.where(outside, self.lane, other)
        self.put(target, self.get(source, np.uint32)[np.arange(self.threads) - self.lane + other], active)

    def do_redux(self, statement: Statement, active: Array) -> None:
        how, kind = {"add": np.sum, "min": np.min, "max": np.max}[statement.opcode.split(".")[2]], np.int32
        found = how(self.get(statement.operands[1], kind).reshape(-1, 32), axis=1).astype(kind)
        self.put(statement.operands[0], np.repeat(found, 32), active)

    def do_cp(self, statement: Statement, active: Array) -> None:
        """An asynchronous copy, complete at once here; bytes beyond the source's size are set to zero."""
        if statement.opcode.startswith(("cp.async.commit", "cp.async.wait")) or not active.any():
            return
        target, source, size, *read = statement.operands
        wanted, length = _integer(size), self.get(read[0] if read else size, np.uint32)[active]
        _, into = self._place(True, target, active, wanted)
        some = length > 0
        self.products.stores(into)
        self.shared[into] = 0
        if some.any():
            content, since = self.memory.at(self.address(source)[active][some], wanted)
            assert (length[some] == wanted).all()
            self.shared[into[some]] = content[since]

    def do_membar(self, statement: Statement, active: Array) -> None:
        """Does nothing: writes are visible at once."""

    def do_fence(self, statement: Statement, active: Array) -> None:
        """Makes earlier writes visible to products of a group of warps; all other accesses see them at once."""
        if statement.opcode.startswith("fence.proxy.async"):
            assert active.all()
            self.products.unseen[:] = False

    def do_ldmatrix(self, statement: Statement, active: Array) -> None:
        """Thread i of the eight of matrix j has row i's address; each thread gets two adjacent values per matrix."""
        names, addresses = self.names(statement.operands[0]), self.address(statement.operands[1]).reshape(-1, 32)
        for number, name in enumerate(names):
            rows = addresses[:, 8 * number : 8 * number + 8].astype(np.int64)
            assert not (rows % 16).any()
            matrix = self.shared[rows[..., None] + np.arange(16)].view(np.uint16)
            if ".trans" in statement.opcode:
                matrix = np.ascontiguousarray(matrix.transpose(0, 2, 1))
            self.put(name, matrix.reshape(-1, 64).view(np.uint32).reshape(-1), active)

    def do_stmatrix(self, statement: Statement, active: Array) -> None:
        """The reverse of `ldmatrix`."""
        names, addresses = self.names(statement.operands[1]), self.address(statement.operands[0]).reshape(-1, 32)
        for number, name in enumerate(names):
            rows = addresses[:, 8 * number : 8 * number + 8].astype(np.int64)
            assert not (rows % 16).any()
            matrix = self.get(name, np.uint32).view(np.uint16).reshape(-1, 8, 8)
            if ".trans" in statement.opcode:
                matrix = np.ascontiguousarray(matrix.transpose(0, 2, 1))
            self.products.stores(rows[..., None] + np.arange(16))
            self.shared[rows[..., None] + np.arange(16)] = matrix.view(np.uint8)

    def do_mma(self, statement: Statement, active: Array) -> None:
        """d = a · b + c, (16 × depth) · (depth × 8); a thread has row lane / 4 and column 2 (lane % 4) of each part."""
        shape = re.fullmatch(r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.f16\.f16\.f32", statement.opcode)
        assert shape, statement
        depth = int(shape[1])
        target, first, second, third = map(self.names, statement.operands)
        a = np.zeros((self.threads // 32, 16, depth), np.float32)
        b = np.zeros((self.threads // 32, depth, 8), np.float32)
        for part, name in enumerate(first):
            rows, columns = slice(8 * (part % 2), 8 * (part % 2) + 8), slice(8 * (part // 2), 8 * (part // 2) + 8)
            a[:, rows, columns] = self._halves(name)
        for part, name in enumerate(second):
            b[:, 8 * part : 8 * part + 8, :] = self._halves(name).transpose(0, 2, 1)
        product = a @ b
        for number, (name, since) in enumerate(zip(target, third, strict=True)):
            mine = product[:, 8 * (number // 2) : 8 * (number // 2) + 8, number % 2 :: 2].reshape(-1)
            self.put(name, self.get(since, np.float32) + mine, active)

    def do_wgmma(self, statement: Statement, active: Array) -> None:
        """d = a · b + d, (64 × 16) · (16 × columns), of four warps: each has 16 rows in the layout of `mma`."""
        assert active.all(), statement
        step = statement.opcode.split(".")[1]
        if step == "fence":
            self.products.unfenced.clear()
        elif step == "commit_group":
            self.products.group += 1
        elif step == "wait_group":
            self.products.wait(int(statement.operands[0]))
        else:
            self._products(statement)

    def _products(self, statement: Statement) -> None:
        shape = re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.f16\.f16", statement.opcode)
        assert shape, statement
        columns, warps = int(shape[1]), self.threads // 32
        target, first, second, kept, *signs = statement.operands
        assert signs[:2] == ["1", "1"] and (first.startswith("{") or signs[2] == "0"), statement
        results, read = self.names(target), []

        def matrix(operand: str, rows: int, transposed: bool) -> Array:
            found = {int(value) for value in self.get(operand, np.uint64)}
            assert len(found) == 1, "warps must use the same matrix"
            read.append(places(found.pop(), rows, transposed))
            return self.shared[read[-1]].view(np.float16)[..., 0].astype(np.float32)

        a = np.zeros((warps, 16, DEPTH), np.float32)
        if first.startswith("{"):
            for part, name in enumerate(self.names(first)):
                rows, depth = slice(8 * (part % 2), 8 * (part % 2) + 8), slice(8 * (part // 2), 8 * (part // 2) + 8)
                a[:, rows, depth] = self._halves(name)
        else:
            number = self.registers["%tid.x"][::32] // 32 % 4
            a = matrix(first, 64, False).reshape(4, 16, DEPTH)[number]
        product = a @ matrix(second, columns, signs[-1] == "1").T
        self.products.begin(results, self.names(first) if first.startswith("{") else (), read)
        keep = self.get(kept, np.bool_)
        for number, name in enumerate(results):
            rows, at = slice(8 * (number // 2 % 2), 8 * (number // 2 % 2) + 8), 8 * (number // 4) + number % 2
            mine = product[:, rows, at : at + 8 : 2].reshape(-1)
            old = self.registers[name].view(np.float32) if keep.all() else np.float32(0)
            self._put(name, old + mine, self.all)

    def _halves(self, name: str) -> Array:
        """Returns a register's pairs of float16 as 8 × 8 matrices, one per warp."""
        return self.get(name, np.uint32).view(np.float16).reshape(-1, 8, 8)

    # Arithmetic

    def do_prmt(self, statement: Statement, active: Array) -> None:
        target, first, second, selector = statement.operands
        choice = _integer(selector)
        parts = np.stack([self.get(first, np.uint32), self.get(second, np.uint32)], 1).view(np.uint8)
        columns = [choice >> 4 * byte & 0xF for byte in range(4)]
        assert max(columns) < 8
        self.put(target, np.ascontiguousarray(parts[:, columns]).view(np.uint32)[:, 0], active)

    def do_shf(self, statement: Statement, active: Array) -> None:
        """Shifts two registers as one; returns the upper half for a left shift, the lower for a right shift."""
        target, low, high, by = statement.operands
        _, way, mode, _ = statement.opcode.split(".")
        assert mode == "wrap"
        both = self.get(low, np.uint32).astype(np.uint64) | self.get(high, np.uint32).astype(np.uint64) << np.uint64(32)
        amount = self.get(by, np.uint32).astype(np.uint64) % np.uint64(32)
        result = (both << amount) >> np.uint64(32) if way == "l" else both >> amount
        self.put(target, result.astype(np.uint32), active)

    def do_bfe(self, statement: Statement, active: Array) -> None:
        kind = KINDS[statement.opcode.split(".")[-1]]
        target, source, start, length = statement.operands
        first, count = int(start), int(length)
        value = self.get(source, kind).astype(np.int64) << np.int64(64 - first - count)
        if kind == np.uint32:
            value = (value.view(np.uint64) >> np.uint64(64 - count)).view(np.int64)
        else:
            value >>= np.int64(64 - count)
        self.put(target, value.astype(kind), active)

    def _arithmetic(self, statement: Statement, active: Array) -> None:
        name, *how, kind_name = statement.opcode.split(".")
        packed = kind_name == "f16x2"
        kind = np.float16 if packed else KINDS[kind_name]
        target, *sources = statement.operands
        wide = "wide" in how
        assert "hi" not in how and "sat" not in how, statement
        values = []
        for number, source in enumerate(sources):
            if packed:
                values.append(self.get(source, np.uint32).view(np.float16))
            elif wide and number == 2:
                values.append(self.get(source, WIDER[kind]))
            else:
                value = self.get(source, kind if name not in ("shl", "shr") or number == 0 else np.uint32)
                values.append(value.astype(WIDER[kind]) if wide else value)
        with np.errstate(all="ignore"):
            result = OPERATIONS[name](*values)
        if kind == np.float32 and "ftz" in how:
            result = np.where(np.abs(result) < 2.0**-126, result * np.float32(0), result)
        self.put(target, result.view(np.uint32) if packed else result, active)


def _divided(first: Array, second: Array) -> Array:
    if first.dtype.kind == "f":
        return first / second
    if first.dtype.kind == "u":
        return first // second
    # Round towards zero.
    size = np.abs(first) // np.abs(np.where(second == 0, 1, second))
    return (np.sign(first) * np.sign(second) * size).astype(first.dtype)


def _shifted(first: Array, by: Array, left: bool) -> Array:
    bits = 8 * first.itemsize
    amount = np.minimum(by, bits - 1).astype(first.dtype)
    result = first << amount if left else first >> amount
    if left or first.dtype.kind == "u":
        return np.where(by >= bits, first.dtype.type(0), result)
    return result


def _fused(a: Array, b: Array, c: Array) -> Array:
    """Returns a · b + c, rounded once: in float64 the product of two float32 is exact."""
    if a.dtype.kind != "f":
        return a * b + c
    result: Array = (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)
    return result


OPERATIONS: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mad": _fused, "fma": _fused, "div": _divided,
    "rem": np.fmod, "neg": np.negative, "not": np.bitwise_not, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "min": np.fmin, "max": np.fmax, "abs": np.abs, "ex2": np.exp2, "lg2": np.log2,
    "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda a: 1 / np.sqrt(a),
    "shl": lambda a, b: _shifted(a, b, True), "shr": lambda a, b: _shifted(a, b, False),
}  # fmt: skip
for _name in OPERATIONS:
    setattr(Threads, f"do_{_name}", Threads._arithmetic)


def _block(groups: list[Iterator[str]]) -> Iterator[None]:
    """Runs the threads of one program, group by group from barrier to barrier; yields where other programs continue."""
    while groups:
        waiting = []
        for group in reversed(groups):
            for pause in group:
                if pause == "barrier":
                    waiting.append(group)
                    break
                yield
        groups = waiting


def run(text: str, grid: Sequence[int], shared: int, arguments: Sequence[Any], *, together: bool = True) -> None:
    """Runs a kernel on a grid of programs.

    Args:
        shared: bytes of shared memory of each program.
        arguments: values of its parameters, with tensors for addresses.
        together: whether all threads of a program execute each instruction together; else warp by warp, which is
            several times slower.
    """
    program = Program.parse(text)
    memory = Memory.of([value for value in arguments if isinstance(value, torch.Tensor)])
    arguments = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
    x, y, z = size = (*grid, 1, 1)[:3]
    places = itertools.product(range(x), range(y), range(z))
    groups = np.split(np.arange(program.threads), 1 if together else program.threads // 32)
    running = []
    for place in places:
        own = np.full(shared, POISON, np.uint8)
        running.append(_block([Threads(program, memory, own, group, place, size, arguments).run() for group in groups]))
    while running:
        running = [block for block in running if next(block, StopIteration) is not StopIteration]
