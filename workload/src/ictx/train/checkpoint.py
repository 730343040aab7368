"""Sharded checkpoints that are there as a whole or not at all, and are read only if they are what was written."""

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
"""In a run's folder: the model's configuration, which its checkpoints need to be read without the run's settings."""
NAME = re.compile(r"step-(\d{8})")
SET_ASIDE = ".unusable"
"""Ends the name of a checkpoint that was not what it should be when an older one was taken instead."""


class Checkpoints:
    """The checkpoints of a run: folders `step-00000100`, renamed to that when all ranks have written theirs."""

    def __init__(self, directory: Path, keep: int) -> None:
        """Args: `directory` is on storage that all ranks share; only the newest `keep` stay. Every rank makes one."""
        self.directory, self.keep = directory, keep
        # What is written beside the training loop must not meet its collectives.
        self._group = dist.new_group(backend="gloo")
        pinned = torch.cuda.is_available()
        # A thread begins with the first GPU.
        device = torch.cuda.current_device() if pinned else None
        self._thread = ThreadPoolExecutor(1, initializer=lambda: torch.cuda.set_device(device) if pinned else None)
        self._staging = StagingOptions(pinned, False, False, pinned)

    def complete(self) -> list[Path]:
        """Returns the checkpoints that have all their files as far as names show, oldest first."""
        return [path for path in self._found() if (path / INDEX_FILE).exists()]

    def _found(self) -> list[Path]:
        if not self.directory.exists():
            return []
        return sorted(path for path in self.directory.iterdir() if NAME.fullmatch(path.name))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes a checkpoint; every rank calls it.

        Raises UserError naming the folder when it cannot be written, or when a number in the state is not finite.
        """
        final = self._folder(step, state)
        return self._thread.submit(self._write, final, state).result()

    def begin(self, step: int, state: dict[str, Any]) -> Future[Path]:
        """Copies a state, which may change then, and writes it while the caller goes on; every rank calls it.

        One checkpoint is written after the other. The result raises what `save` does; this raises UserError when a
        number in the state is not finite.
        """
        final = self._folder(step, state)
        # One for each checkpoint: with GPUs PyTorch 2.11's copies only once (KeyError: <class 'type'>).
        copy = DefaultStager(self._staging).stage(state)
        assert isinstance(copy, dict)
        return self._thread.submit(self._write, final, copy)

    def close(self, wait: bool) -> None:
        """Ends the thread; `wait` for what is being written, unless a rank is lost that has a part in it."""
        self._thread.shutdown(wait)

    def _folder(self, step: int, state: dict[str, Any]) -> Path:
        """Returns where a state goes. Raises UserError when it must not be written."""
        final = self.directory / f"step-{step:08}"
        if not all(on_all(lambda: finite(state))):
            raise UserError(
                f"checkpoint {final} is not written, since weights or the optimizer's state are not finite: lower "
                "optimizer.learning_rate; the next start resumes from the checkpoint before"
            )
        return final

    def _write(self, final: Path, state: dict[str, Any]) -> Path:
        """Writes a checkpoint and removes those that are too many then."""
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
        """Fills `state` in place from the newest checkpoint that can be used; returns its step, 0 when there is none.

        Every rank calls it. Newer ones that are damaged, incomplete or writable by others are named and set aside.
        Raises UserError naming the checkpoint when `state` has other tensors than it, or when none can be used.
        """
        # The first rank chooses: on network storage another node may not see the newest folder yet.
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
                f"none of the checkpoints in {self.directory} can be used ({', '.join(path.name for path in found)}; "
                "the lines above give the reasons): restore one, or remove them to train from the start"
            )
        return 0

    def load(self, path: Path, state: dict[str, Any]) -> int:
        """Fills `state` in place from any run's checkpoint, and returns its step; as `load_newest`."""
        path = path.resolve()
        match = NAME.fullmatch(path.name)
        if not match:
            raise UserError(f"{path} is no checkpoint: expected RUN/checkpoints/step-00001000")
        for folder in (path.parent.parent, path.parent):
            on_first(lambda folder=folder: check_owner(folder))  # type: ignore[misc]
        _load(path, state)
        return int(match[1])

    def _remove_drafts(self) -> None:
        """Removes what a process that was killed in the middle of a checkpoint left."""
        for draft in self.directory.glob("step-????????.part"):
            shutil.rmtree(draft, ignore_errors=True)

    def _close_to_others(self) -> None:
        """Makes the run's folders writable by their owner only: between two checks no other user replaces files.

        Raises Unusable when they are somebody else's.
        """
        for folder in (self.directory.parent.resolve(), self.directory.resolve()):
            if folder.exists():
                check_owner(folder, any_mode=True)
                mode = stat.S_IMODE(folder.stat().st_mode)
                if mode & OTHERS_WRITE:
                    print(f"{folder}: taking write access from others (mode was {mode:04o})", flush=True)
                    folder.chmod(mode & ~OTHERS_WRITE)


def finite(state: Mapping[str, Any]) -> bool:
    """Whether all numbers of this rank's tensors are."""
    extremes: list[Tensor] = []
    for leaf in tree_leaves(state):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            local = leaf.to_local() if isinstance(leaf, DTensor) else leaf
            if local.numel():
                extremes += torch.aminmax(local.float())
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one of a run's checkpoints, usable or not."""
    return bool(NAME.fullmatch(path.name))


def load_model(path: Path) -> Transformer:
    """Returns the model of a run's checkpoint.

    Raises UserError when the checkpoint is damaged or somebody else's, or its run's MODEL_FILE does not describe it.
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
        raise UserError(f"checkpoint {path} has an adapter (train.lora): take the run's export, where it is merged")
    try:
        load(state, storage_reader=reader, planner=SafePlanner(), no_dist=True)
    except CheckpointException as error:
        raise UserError(f"checkpoint {path} is no model of {MODEL_FILE}: {_cause(error)}") from error
    return model.eval()


def trusted_files(path: Path) -> tuple[set[str], dict[str, Entry]]:
    """Returns a checkpoint's files, and which have a checksum, after a look at names, owners and modes.

    Only the manifest is read. Earlier versions wrote none: of their checkpoints no file has a checksum.
    Raises Unusable naming what is wrong.
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
    """Fills the state; every rank calls it and checks a part of the files. Raises Unusable, and UserError."""
    files, entries = on_first(lambda: trusted_files(path))
    # A rank's number is in the names of its files: at the same world size it reads again what it has just checked.
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
                f"checkpoint {path} does not fit this configuration ({_cause(error)}): give the settings that it was "
                "made with, or another run.dir"
            ) from error
        raise Unusable(f"{path}: {_cause(error)}") from error
    if not all(on_all(lambda: finite(state))):
        raise Unusable(f"{path}: it holds numbers that are not finite")


def _begin(draft: Path) -> None:
    """Makes an empty folder that only this user can write to."""
    shutil.rmtree(draft, ignore_errors=True)
    draft.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    draft.mkdir(mode=0o755)


def _publish(draft: Path, final: Path, entries: Mapping[str, Entry]) -> None:
    """Gives a draft that all ranks have written its manifest, and then its name."""
    check_names(draft, entries)
    write(draft, entries)
    if final.exists():
        _set_aside([final])
    draft.replace(final)
    sync(final.parent)


def _set_aside(paths: Iterable[Path]) -> None:
    """Renames checkpoints, so that they count no more; they are the user's to look at and to remove."""
    for path in paths:
        names = (path.with_name(f"{path.name}{SET_ASIDE}{number or ''}") for number in itertools.count())
        path.replace(next(name for name in names if not os.path.lexists(name)))


def _first(error: CheckpointException) -> BaseException:
    """Returns what went wrong on the lowest rank that something went wrong on."""
    return error.failures[min(error.failures)][0]


def _cause(error: BaseException) -> str:
    """Returns the first line of what went wrong."""
    return str(_first(error) if isinstance(error, CheckpointException) else error).partition("\n")[0]
