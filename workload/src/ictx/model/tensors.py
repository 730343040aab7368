"""Tensors in safetensors files: shards with an index and a checksum per tensor, which is verified on read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ictx.errors import UserError

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
CHECKSUM = "crc32 "
"""Prefix of a tensor's name in a file's metadata: the key of its checksum."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Supported dtypes of weights; others are quantised, or not weights."""


def checksum(tensor: Tensor) -> str:
    """Returns the CRC-32 of a tensor's bytes."""
    return f"{zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data):08x}"


def write_tensors(directory: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """Writes tensors (on the CPU) to as many files as their size requires; each shard is freed once it is written.

    Raises UserError if a file cannot be written.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal pending, size
        file = directory / f"part-{len(shards)}"
        metadata = {"format": "pt"} | {CHECKSUM + name: checksum(tensor) for name, tensor in pending.items()}
        try:
            save_file(pending, file, metadata=metadata)
        except SafetensorError as error:
            raise UserError(f"cannot write {file}: {error}") from error
        _order_metadata(file)
        shards.append(list(pending))
        pending, size = {}, 0

    for name, tensor in tensors:
        more = tensor.numel() * tensor.element_size()
        if pending and size + more > max_shard_bytes:
            flush()
        # A view keeps its whole base tensor in memory: copy it.
        pending[name] = tensor.contiguous().clone() if tensor._base is not None else tensor.contiguous()
        size, total = size + more, total + more
    flush()
    if len(shards) == 1:
        (directory / "part-0").rename(directory / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (directory / f"part-{number}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _order_metadata(file: Path) -> None:
    """Sorts a file's metadata in place, for reproducible files: the library writes it in random order."""
    with file.open("r+b") as content:
        length = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(ordered) == length:
            content.seek(8)
            content.write(ordered)


class TensorFiles:
    """The tensors of a folder, by name."""

    def __init__(self, directory: Path) -> None:
        """Reads the headers. Raises UserError naming a file that is missing or corrupt, and the first bad tensor."""
        self.directory = directory
        self.headers: dict[Path, dict[str, Any]] = {}
        self.files: dict[str, Path] = {}
        index = directory / INDEX_FILE
        if index.exists():
            weight_map = self._weight_map(index)
            files = [directory / file for file in sorted(set(weight_map.values()))]
        else:
            weight_map, files = None, [directory / SINGLE_FILE]
        for file in files:
            self.headers[file] = self._header(file)
            self.files |= dict.fromkeys((name for name in self.headers[file] if name != "__metadata__"), file)
        for name, file_name in (weight_map or {}).items():
            if name not in self.headers[directory / file_name]:
                raise UserError(f"{directory / file_name}: tensor {name} is missing, but {INDEX_FILE} lists it")

    def _weight_map(self, index: Path) -> dict[str, str]:
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            # Reject paths: files must be in this folder.
            if not weight_map or any(Path(name).name != name for name in weight_map.values()):
                raise ValueError("expected file names in weight_map")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index} is not an index of tensors: {error}") from error
        return dict(weight_map)

    def _header(self, file: Path) -> dict[str, Any]:
        """Returns the header of a file. Raises UserError if it is missing, corrupt, or exceeds the file's size."""
        try:
            size = file.stat().st_size
            with file.open("rb") as content:
                length = int.from_bytes(content.read(8), "little")
                if not 2 <= length <= size - 8:
                    raise UserError(
                        f"{file} is truncated or not a safetensors file: its header does not fit in {size} bytes"
                    )
                header = json.loads(content.read(length))
        except FileNotFoundError as error:
            raise UserError(f"{file} is missing") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is corrupt: its header is not JSON") from error
        try:
            # Some writers store null if there is no metadata.
            header = {"__metadata__": dict(header.pop("__metadata__", None) or {})} | header
            spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
            beyond = [name for name, (_, end) in spans.items() if 8 + length + end > size]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is corrupt: its header does not describe tensors") from error
        if beyond:
            first = min(beyond, key=lambda name: int(spans[name][0]))
            raise UserError(f"{file} is truncated: tensor {first} ends beyond the end of the file, {size} bytes")
        return dict(header)

    def dtype(self, name: str) -> torch.dtype:
        """Returns a tensor's dtype. Raises UserError if the tensor is missing or its dtype is not supported."""
        if name not in self.files:
            raise UserError(f"{self.directory}: tensor {name} is missing")
        file = self.files[name]
        stored = self.headers[file][name].get("dtype")
        if stored not in DTYPES:
            raise UserError(f"{file}: tensor {name} has dtype {stored}: expected one of {', '.join(DTYPES)}")
        return DTYPES[stored]

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterable[tuple[str, Tensor]]:
        """Yields these tensors, file by file. Raises UserError naming the file and the tensor that is invalid."""
        for name in shapes:
            self.dtype(name)
        for file, header in self.headers.items():
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in header:
                        if name in shapes:
                            yield name, self._checked(file, name, tensors.get_tensor(name), shapes[name])
            except SafetensorError as error:
                raise UserError(f"{file} is corrupt: {error}") from error

    def _checked(self, file: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(tensor.shape) != shape:
            raise UserError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}: expected {shape}")
        known = self.headers[file]["__metadata__"].get(CHECKSUM + name)
        if known is not None and known != checksum(tensor):
            raise UserError(f"{file} is corrupt: tensor {name} has checksum {checksum(tensor)}: expected {known}")
        if tensor.numel() and not all(value.isfinite() for value in tensor.aminmax()):
            raise UserError(f"{file}: tensor {name} contains NaN or infinity")
        return tensor
