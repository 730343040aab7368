"""The evaluated model: a folder, or a registered version whose files are downloaded and verified."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from ictx.download import Source, fetch_all, held_version
from ictx.errors import UserError
from ictx.folder import write_whole
from ictx.manifest import hash_files, read_json
from ictx.model.hf_config import CONFIG_FILE
from ictx.registry import ModelRef, explained, new_client

NOTE = "models.json"
"""File in an evaluation's folder: the version of each alias at the start."""


@dataclass(frozen=True)
class Subject:
    """A model's folder and its registered version."""

    folder: Path
    ref: ModelRef | None = None
    """Name and version; None for a model that is not registered."""

    def __str__(self) -> str:
        return str(self.ref or self.folder)

    @property
    def digest(self) -> str:
        """SHA-256 over the files that determine what the model computes."""
        names = sorted(path.name for path in self.folder.glob("*") if path.suffix in (".safetensors", ".json"))
        sums = hash_files(self.folder, names)
        return hashlib.sha256("".join(f"{name} {sums[name].sha256}\n" for name in names).encode()).hexdigest()


def find(name: str, out: Path, cache: Path) -> Subject:
    """Returns the model `models:/NAME/VERSION` or `models:/NAME@ALIAS`, or that in a folder.

    An alias is resolved once and recorded in `out`, so that a restart evaluates the same version. Files are downloaded
    to `cache` and verified. Raises UserError if there is no such version or folder.
    """
    if name.startswith("models:"):
        return _registered(ModelRef.parse(name), out, cache)
    folder = Path(name)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{name} is not a model (no {CONFIG_FILE}): expected a folder, models:/NAME/VERSION or models:/NAME@ALIAS"
        )
    return Subject(folder.resolve())


def _registered(ref: ModelRef, out: Path, cache: Path) -> Subject:
    with explained():
        fixed = ModelRef(ref.name, version=_version(ref, out))
        target = cache / f"{fixed.name}-{fixed.version}"
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if held_version(target) != (fixed.name, fixed.version):
                draft = target.with_name(f"{target.name}.part")
                fetch_all(Source.find(new_client(), fixed), draft)
                shutil.rmtree(target, ignore_errors=True)
                draft.rename(target)
    return Subject(target, fixed)


def _version(ref: ModelRef, out: Path) -> str:
    """Returns the version; that of an alias as recorded by an earlier start, because an alias can move."""
    note = out / NOTE
    if ref.alias and note.exists():
        noted: dict[str, str] = read_json(note)
        if str(ref) in noted:
            return noted[str(ref)]
    version = str(ref.find(new_client()).version)
    if ref.alias:
        out.mkdir(parents=True, exist_ok=True)
        noted = read_json(note) if note.exists() else {}
        write_whole(note, json.dumps({**noted, str(ref): version}) + "\n")
        print(f"{ref} is version {version}")
    return version
