"""PyTorch's checkpoint files: hashed while they are written, and read without executing code in them.

Distributed checkpoints store their index (`.metadata`) and non-tensor values as pickles. Manifest (`ictx.manifest`) and
owner are verified before they are read; in addition, unpickling is restricted to plain data here.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from ictx.manifest import BLOCK, MANIFEST_FILE, Entry, Unusable, open_regular

INDEX_FILE = ".metadata"
"""PyTorch's index of tensors and their places; written last."""
HAS_MANIFEST = "manifest"
"""Key in the state of checkpoints with a manifest, to detect that the manifest was removed."""
# Classes in an index, besides dtypes.
INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}


class Misfit(Exception):
    """The state to fill has other tensors than the checkpoint."""


class _HashedFile(io.BufferedWriter):
    """A new file that only its owner can write to."""

    def __init__(self, path: Path, hasher: ThreadPoolExecutor) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        super().__init__(io.FileIO(descriptor, "wb"))
        self.hasher, self.sha256, self.size = hasher, hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        # Both release the GIL: large blocks are hashed while they are written.
        hashed = self.hasher.submit(self.sha256.update, content) if len(content) >= BLOCK else None
        if not hashed:
            self.sha256.update(content)
        try:
            count = super().write(content)
        finally:
            if hashed:
                hashed.result()
        self.size += count
        return count


class _HashingFiles(FileSystem):
    """File system that records the written files in `entries`."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.hasher = ThreadPoolExecutor(1)

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        assert mode == "wb"
        with _HashedFile(Path(path), self.hasher) as file:
            yield file
        self.entries[Path(path).name] = Entry(file.sha256.hexdigest(), file.size)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)


class HashingWriter(FileSystemWriter):
    """Writes a rank's files, with checksums in `entries`."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.fs = self.files = _HashingFiles()

    @property
    def entries(self) -> dict[str, Entry]:
        """Entries of the files that this rank wrote."""
        return self.files.entries


def _member(kind: type[Enum], name: str) -> Enum:
    """Returns an enum member: Python 3.11.0 to 3.11.3 (Debian 12) pickles it as `getattr(kind, name)`."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError("it refers to builtins.getattr")
    return kind[name]


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name in INDEX_CLASSES.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


class SafeReader(FileSystemReader):
    """Reads a rank's files; call `open` first."""

    def __init__(self, directory: Path, names: Collection[str], verified: bool) -> None:
        """Args: `names` are the files that may be read; `verified` is whether the checkpoint has a manifest."""
        super().__init__(directory)
        self.directory, self.names, self.verified = directory, names, verified

    def open(self) -> None:
        """Reads the index. Raises Unusable (DCP would log an invalid index as two tracebacks)."""
        path = self.directory / INDEX_FILE
        try:
            with open_regular(path) as file:
                self.index: Metadata = _IndexUnpickler(file).load()
            tensors, places = self.index.state_dict_metadata, self.index.storage_data
            others = {info.relative_path for info in places.values()} - set(self.names)
        except Unusable:
            raise
        except Exception as error:  # unpickling arbitrary data can raise anything
            raise Unusable(f"{path}: is not the index of a checkpoint ({str(error)[:100]!r})") from error
        if others:
            raise Unusable(f"{path}: refers to {str(min(others, key=str))[:100]!r}, which is not in the manifest")
        if not self.verified and HAS_MANIFEST in tensors:
            raise Unusable(f"{self.directory / MANIFEST_FILE}: is missing")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Returns the index."""
        return self.index


class SafePlanner(DefaultLoadPlanner):
    """Plans loading into a state."""

    def create_local_plan(self) -> LoadPlan:
        """Returns the load plan. Raises Misfit.

        Non-tensor values that are missing in the checkpoint (of an earlier version) stay unchanged.
        """
        known = self.metadata.state_dict_metadata if self.metadata else {}
        wanted = self.state_dict.items()
        self.state_dict = {name: value for name, value in wanted if name in known or isinstance(value, Tensor)}
        try:
            return super().create_local_plan()
        except (ValueError, RuntimeError) as error:
            raise Misfit(str(error)) from error

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Loads a non-tensor value."""
        place = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, place, torch.load(value, weights_only=True))
