"""Sharded checkpoints: written atomically, and verified before they are loaded."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from ictx.errors import UserError
from ictx.folder import sync
from ictx.manifest import (
    MANIFEST_FILE,
    OTHERS_WRITE,
    Entry,
    Unusable,
    check_files,
    check_names,
    check_owner,
    list_files,
    read,
    write,
)
from ictx.model import ModelConfig, Transformer
from ictx.train.ranks import on_all, on_first
from ictx.train.storage import HAS_MANIFEST, INDEX_FILE, HashingWriter, Misfit, SafePlanner, SafeReader

MODEL_FILE = "model.yaml"
"""File in a run's folder with the model's configuration, to load its checkpoints without the run's settings."""
NAME = re.compile(r"step-(\d{8})")
SET_ASIDE = ".unusable"
"""Suffix of a checkpoint that failed verification, so that an older one was loaded instead."""


class Checkpoints:
    """The checkpoints of a run: folders `step-00000100`, renamed to this when all ranks have written their files."""

    def __init__(self, directory: Path, keep: int) -> None:
        """Every rank creates one.

        Args:
            directory: folder on storage that all ranks share.
            keep: number of newest checkpoints to keep.
        """
        self.directory, self.keep = directory, keep
        # Its own group, because checkpoints are written concurrently with the training loop's collectives.
        self._group = dist.new_group(backend="gloo")
        pinned = torch.cuda.is_available()
        # A new thread's default device is the first GPU.
        device = torch.cuda.current_device() if pinned else None
        self._thread = ThreadPoolExecutor(1, initializer=lambda: torch.cuda.set_device(device) if pinned else None)
        self._staging = StagingOptions(pinned, False, False, pinned)

    def complete(self) -> list[Path]:
        """Returns the complete checkpoints, oldest first; checks only names."""
        return [path for path in self._found() if (path / INDEX_FILE).exists()]

    def _found(self) -> list[Path]:
        if not self.directory.exists():
            return []
        return sorted(path for path in self.directory.iterdir() if NAME.fullmatch(path.name))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes a checkpoint; every rank calls it.

        Raises UserError if it cannot be written, or if a number in the state is not finite.
        """
        final = self._folder(step, state)
        return self._thread.submit(self._write, final, state).result()

    def begin(self, step: int, state: dict[str, Any]) -> Future[Path]:
        """Copies a state and writes it in the background; every rank calls it.

        Checkpoints are written one at a time. The future raises the errors of `save`; this raises UserError if a number
        in the state is not finite.
        """
        final = self._folder(step, state)
        # A new stager per checkpoint: with GPUs PyTorch 2.11's works only once (KeyError: <class 'type'>).
        copy = DefaultStager(self._staging).stage(state)
        assert isinstance(copy, dict)
        return self._thread.submit(self._write, final, copy)

    def close(self, wait: bool) -> None:
        """Stops the thread; `wait` for a checkpoint that is being written. Do not wait if a rank is lost."""
        self._thread.shutdown(wait)

    def _folder(self, step: int, state: dict[str, Any]) -> Path:
        """Returns a checkpoint's folder. Raises UserError if the state is not finite."""
        final = self.directory / f"step-{step:08}"
        if not all(on_all(lambda: finite(state))):
            raise UserError(
                f"checkpoint {final} was not written, because weights or optimizer state are not finite: lower "
                "optimizer.learning_rate; the next start resumes from the previous checkpoint"
            )
        return final

    def _write(self, final: Path, state: dict[str, Any]) -> Path:
        """Writes a checkpoint and removes the oldest ones beyond `keep`."""
        draft, group = final.with_suffix(".part"), self._group
        try:
            on_first(lambda: _begin(draft), group)
            writer = HashingWriter(draft)
            save({**state, HAS_MANIFEST: True}, storage_writer=writer, process_group=group)
            entries = {name: entry for rank in on_all(lambda: writer.entries, group) for name, entry in rank.items()}
            on_first(lambda: _publish(draft, final, entries), group)
        except (CheckpointException, OSError, Unusable) as error:
            if dist.get_rank() == 0:
                shutil.rmtree(draft, ignore_errors=True)
            raise UserError(f"cannot write checkpoint {final}: {_cause(error)}") from error
        on_first(self._remove_old, group)
        return final

    def _remove_old(self) -> None:
        for old in self.complete()[: -self.keep]:
            shutil.rmtree(old)

    def load_newest(self, state: dict[str, Any]) -> int:
        """Loads the newest usable checkpoint into `state` in place; returns its step, 0 if there is no checkpoint.

        Every rank calls it. Newer ones that are damaged, incomplete or writable by others are reported and renamed
        (SET_ASIDE). Raises UserError if `state` has other tensors than the checkpoint, or if none is usable.
        """
        # The first rank lists them: on network storage another node may not see the newest folder yet.
        on_first(self._close_to_others)
        on_first(self._remove_drafts)
        found = on_first(self._found)
        unusable: list[Path] = []
        for path in reversed(found):
            try:
                _load(path, state)
            except Unusable as error:
                if dist.get_rank() == 0:
                    print(f"checkpoint {path.name} is not used: {error}", flush=True)
                unusable.append(path)
                continue
            on_first(lambda: _set_aside(unusable))
            match = NAME.fullmatch(path.name)
            assert match
            return int(match[1])
        if unusable:
            raise UserError(
                f"no checkpoint in {self.directory} is usable ({', '.join(path.name for path in found)}; "
                "see the reasons above): restore one, or remove them to train from step 0"
            )
        return 0

    def load(self, path: Path, state: dict[str, Any]) -> int:
        """Loads any run's checkpoint into `state` in place; returns its step. Raises like `load_newest`."""
        path = path.resolve()
        match = NAME.fullmatch(path.name)
        if not match:
            raise UserError(f"{path} is not a checkpoint: expected RUN/checkpoints/step-00001000")
        for folder in (path.parent.parent, path.parent):
            on_first(lambda folder=folder: check_owner(folder))  # type: ignore[misc]
        _load(path, state)
        return int(match[1])

    def _remove_drafts(self) -> None:
        """Removes incomplete checkpoints of a killed process."""
        for draft in self.directory.glob("step-????????.part"):
            shutil.rmtree(draft, ignore_errors=True)

    def _close_to_others(self) -> None:
        """Makes the run's folders writable only by their owner, so that others cannot replace files after a check.

        Raises Unusable if another user owns them.
        """
        for folder in (self.directory.parent.resolve(), self.directory.resolve()):
            if folder.exists():
                check_owner(folder, any_mode=True)
                mode = stat.S_IMODE(folder.stat().st_mode)
                if mode & OTHERS_WRITE:
                    print(f"{folder}: removing write access of others (mode was {mode:04o})", flush=True)
                    folder.chmod(mode & ~OTHERS_WRITE)


def finite(state: Mapping[str, Any]) -> bool:
    """Whether all numbers of this rank's tensors are finite."""
    extremes: list[Tensor] = []
    for leaf in tree_leaves(state):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            local = leaf.to_local() if isinstance(leaf, DTensor) else leaf
            if local.numel():
                extremes += torch.aminmax(local.float())
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return bool(NAME.fullmatch(path.name))


def load_model(path: Path) -> Transformer:
    """Returns the model of a run's checkpoint.

    Raises UserError if the checkpoint is damaged or another user's, or does not match its run's MODEL_FILE.
    """
    path = path.resolve()
    for folder in (path.parent.parent, path.parent):
        check_owner(folder)
    files, entries = trusted_files(path)
    check_files(path, entries)
    config = ModelConfig.from_yaml(path.parent.parent / MODEL_FILE)
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    for router in model.routers:
        router.tokens_per_expert.zero_()
    state: dict[str, Any] = {"model": model.state_dict()}
    reader = SafeReader(path, files, bool(entries))
    reader.open()
    if any(".lora_" in name for name in reader.index.state_dict_metadata if name.startswith("model.")):
        raise UserError(f"checkpoint {path} has an adapter (train.lora): use the run's export, in which it is merged")
    try:
        load(state, storage_reader=reader, planner=SafePlanner(), no_dist=True)
    except CheckpointException as error:
        raise UserError(f"checkpoint {path} does not match its run's {MODEL_FILE}: {_cause(error)}") from error
    return model.eval()


def trusted_files(path: Path) -> tuple[set[str], dict[str, Entry]]:
    """Returns a checkpoint's files, and the manifest's entries, after checking names, owners and modes.

    Reads only the manifest. Earlier versions wrote none: their checkpoints have no entries. Raises Unusable.
    """
    check_owner(path)
    names = list_files(path)
    manifest = (path / MANIFEST_FILE).exists() or INDEX_FILE not in names
    for name in sorted(names) + [MANIFEST_FILE] * manifest:
        check_owner(path / name)
    entries = read(path) if manifest else {}
    if manifest:
        check_names(path, entries)
    return names, entries


def _load(path: Path, state: dict[str, Any]) -> None:
    """Loads into the state; every rank calls it and verifies a part of the files. Raises Unusable and UserError."""
    files, entries = on_first(lambda: trusted_files(path))
    # File names contain the rank's number, so that at the same world size a rank verifies the files that it reads.
    names = sorted(entries, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    share = {name: entries[name] for name in names[dist.get_rank() :: dist.get_world_size()]}
    on_all(lambda: check_files(path, share))
    reader = SafeReader(path, files, bool(entries))
    on_all(reader.open)
    try:
        load(state, storage_reader=reader, planner=SafePlanner())
    except CheckpointException as error:
        first = _first(error)
        if isinstance(first, Misfit):
            raise UserError(
                f"checkpoint {path} does not match this configuration ({_cause(error)}): use the settings that it was "
                "created with, or another run.dir"
            ) from error
        raise Unusable(f"{path}: {_cause(error)}") from error
    if not all(on_all(lambda: finite(state))):
        raise Unusable(f"{path}: contains numbers that are not finite")


def _begin(draft: Path) -> None:
    """Creates an empty folder that only this user can write to."""
    shutil.rmtree(draft, ignore_errors=True)
    draft.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    draft.mkdir(mode=0o755)


def _publish(draft: Path, final: Path, entries: Mapping[str, Entry]) -> None:
    """Writes the manifest of a draft that all ranks have completed, and renames it to its final name."""
    check_names(draft, entries)
    write(draft, entries)
    if final.exists():
        _set_aside([final])
    draft.replace(final)
    sync(final.parent)


def _set_aside(paths: Iterable[Path]) -> None:
    """Renames checkpoints so that they are ignored; the user can inspect and remove them."""
    for path in paths:
        names = (path.with_name(f"{path.name}{SET_ASIDE}{number or ''}") for number in itertools.count())
        path.replace(next(name for name in names if not os.path.lexists(name)))


def _first(error: CheckpointException) -> BaseException:
    """Returns the error of the lowest rank that failed."""
    return error.failures[min(error.failures)][0]


def _cause(error: BaseException) -> str:
    """Returns the first line of an error."""
    return str(_first(error) if isinstance(error, CheckpointException) else error).partition("\n")[0]
