"""Manifests: the files of a folder with sizes and SHA-256, written after all of them are complete.

Folders written by another process (checkpoints, prepared data, models) are verified with their manifest before use.
Imports only the standard library, so that verification does not need torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ictx.errors import UserError
from ictx.folder import sync

MANIFEST_FILE, FORMAT = "manifest.json", 1
LARGEST_TEXT = 16 << 20
"""Size limit (bytes) of manifests and other JSON files."""
SHA256 = re.compile("[0-9a-f]{64}")
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
BLOCK = 1 << 20
# hashlib releases the GIL. Few threads, because the ranks of a node share its cores and storage.
THREADS = min(4, len(os.sched_getaffinity(0)))


class Unusable(UserError):
    """A file or folder that must not be used: damaged, incomplete, or writable by others."""


@dataclass(frozen=True)
class Entry:
    """Checksum and size of a file."""

    sha256: str
    """In hexadecimal."""
    size: int | None = None
    """Bytes; None if only the checksum is known."""


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading. Raises Unusable for anything else (symbolic links are not followed)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        link = path.is_symlink()
        raise Unusable(f"{path}: {'is a symbolic link' if link else error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unusable(f"{path}: is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file that another user may have written. Raises Unusable."""
    with open_regular(path) as file:
        content = file.read(LARGEST_TEXT + 1)
    if len(content) > LARGEST_TEXT:
        raise Unusable(f"{path}: has more than {LARGEST_TEXT >> 20} MiB")
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{path}: is not JSON ({str(error)[:100]})") from error


def digest(path: Path, progress: Callable[[int], object] = int) -> Entry:
    """Returns a file's entry; calls `progress` with each block's bytes. Raises Unusable if it cannot be read."""
    sha256, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        try:
            while block := file.read(BLOCK):
                sha256.update(block)
                size += len(block)
                progress(len(block))
        except OSError as error:
            raise Unusable(f"{path}: {error.strerror}") from error
    return Entry(sha256.hexdigest(), size)


def hash_files(directory: Path, names: Iterable[str], progress: Callable[[int], object] = int) -> dict[str, Entry]:
    """Returns the entries of files of a folder by name; hashes in several threads. Raises Unusable."""
    names = list(names)
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: digest(directory / name, progress), names)
        return dict(zip(names, found, strict=True))


def list_files(directory: Path) -> set[str]:
    """Returns the files below a folder except its manifest. Raises Unusable for links and special files."""
    names, folders = set[str](), [""]
    while folders:
        prefix = folders.pop()
        try:
            with os.scandir(directory / prefix) as entries:
                for entry in entries:
                    name = f"{prefix}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{name}/")
                    elif entry.is_file(follow_symlinks=False):
                        names.add(name)
                    else:
                        raise Unusable(f"{shown(directory, name)}: is a symbolic link or a special file")
        except OSError as error:
            raise Unusable(f"{shown(directory, prefix)}: {error.strerror}") from error
    return names - {MANIFEST_FILE}


def shown(directory: Path, name: str) -> str:
    """Returns a path for a message, with non-printable characters escaped."""
    return f"{directory}/{name if name.isprintable() else ascii(name)}"


def write(directory: Path, entries: Mapping[str, Entry]) -> str:
    """Writes and syncs a folder's manifest; returns the manifest's SHA-256. Call it after all other writes."""
    files = {name: asdict(entries[name]) for name in sorted(entries)}
    content = (json.dumps({"format": FORMAT, "files": files}, indent=1) + "\n").encode()
    descriptor = os.open(directory / MANIFEST_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    sync(directory)
    return hashlib.sha256(content).hexdigest()


def read(directory: Path) -> dict[str, Entry]:
    """Returns the entries of a folder's manifest. Raises Unusable if it is missing or invalid."""
    path = directory / MANIFEST_FILE
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("files"), dict):
        raise Unusable(f"{path}: is not a manifest of format {FORMAT}")
    for name, entry in content["files"].items():
        if not isinstance(entry, dict) or set(entry) != {"sha256", "size"}:
            raise Unusable(f"{path}: {name[:100]!r} has no size and SHA-256")
        check_entry(path, name, entry["sha256"])
        if type(entry["size"]) is not int or entry["size"] < 0:
            raise Unusable(f"{path}: {name[:100]!r} has size {str(entry['size'])[:20]!r}")
    return {name: Entry(**entry) for name, entry in content["files"].items()}


def check_entry(path: Path, name: object, sha256: object) -> None:
    """Raises Unusable unless an entry of the list `path` is a file name inside its folder with a SHA-256."""
    inside = isinstance(name, str) and name.isprintable() and name == PurePosixPath(name).as_posix()
    if not inside or str(name) in ("", ".") or str(name).startswith("/") or ".." in str(name).split("/"):
        raise Unusable(f"{path}: {str(name)[:100]!r} is not the name of a file in the folder")
    if not is_sha256(sha256):
        raise Unusable(f"{path}: {str(name)[:100]!r} has no SHA-256")


def is_sha256(value: object) -> bool:
    """Whether a value is a SHA-256 in hexadecimal."""
    return isinstance(value, str) and bool(SHA256.fullmatch(value))


def check_names(directory: Path, entries: Collection[str]) -> None:
    """Raises Unusable if a folder's file names differ from its manifest. Reads no file content."""
    found, wanted = list_files(directory), set(entries)
    if missing := wanted - found:
        raise Unusable(f"{shown(directory, min(missing))}: is missing")
    if extra := found - wanted:
        raise Unusable(f"{shown(directory, min(extra))}: is not in the manifest")


def check_files(directory: Path, entries: Mapping[str, Entry], progress: Callable[[int], object] = int) -> None:
    """Compares sizes and SHA-256 of a folder's files with `entries`. Raises Unusable for the first difference."""
    for name, entry in entries.items():
        # Sizes first: a wrong size is found without hashing.
        with open_regular(directory / name) as file:
            size = os.fstat(file.fileno()).st_size
        if entry.size is not None and size != entry.size:
            raise Unusable(f"{directory / name}: has {size:,} bytes instead of {entry.size:,}")
    for name, found in hash_files(directory, entries, progress).items():
        if found.sha256 != entries[name].sha256:
            raise Unusable(f"{directory / name}: its SHA-256 is {found.sha256} instead of {entries[name].sha256}")


def verify(directory: Path) -> dict[str, Entry]:
    """Verifies a folder with its manifest; returns the entries. Raises Unusable with the file and the difference."""
    entries = read(directory)
    check_names(directory, entries)
    check_files(directory, entries)
    return entries


def check_owner(path: Path, allowed: Collection[int] = (), *, any_mode: bool = False) -> None:
    """Raises Unusable unless a file or folder belongs to this (or an allowed) user and only the owner can write to it.

    Args:
        allowed: user ids besides the process's own.
        any_mode: accept a file that others can write to.

    In a rootless container, root is the job's user, and files of all other users have the overflow id.
    """
    try:
        found = path.lstat()
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror}") from error
    if stat.S_ISLNK(found.st_mode):
        raise Unusable(f"{path}: is a symbolic link")
    if found.st_uid != os.geteuid() and found.st_uid not in allowed:
        raise Unusable(f"{path}: belongs to user id {found.st_uid}, not to {os.geteuid()}")
    if found.st_mode & OTHERS_WRITE and not any_mode:
        mode = stat.S_IMODE(found.st_mode)
        raise Unusable(f"{path}: others can write to it (mode {mode:04o}); if you trust it: chmod go-w {path}")
