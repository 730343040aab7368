"""Sharded checkpoints that are there as a whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ictx.errors import UserError

NAME = re.compile(r"step-(\d{8})")


class Checkpoints:
    """The checkpoints of a run: folders `step-00000100`, renamed to that when all ranks have written theirs."""

    def __init__(self, directory: Path, keep: int) -> None:
        """Args: `directory` is on storage that all ranks share; only the newest `keep` stay."""
        self.directory, self.keep = directory, keep

    def complete(self) -> list[Path]:
        """Returns the complete checkpoints, oldest first."""
        if not self.directory.exists():
            return []
        return sorted(path for path in self.directory.iterdir() if NAME.fullmatch(path.name))

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes a checkpoint; every rank calls it. Raises UserError naming the folder when it cannot be written."""
        final = self.directory / f"step-{step:08}"
        draft = final.with_suffix(".part")
        if dist.get_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)
            self.directory.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        try:
            dcp.save(state, checkpoint_id=draft)
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            if dist.get_rank() == 0:
                shutil.rmtree(draft, ignore_errors=True)
            raise UserError(f"cannot write checkpoint {final}: {cause}") from error
        if dist.get_rank() == 0:
            # A second save of one step (told to stop right after a checkpoint) takes the first one's place.
            shutil.rmtree(final, ignore_errors=True)
            draft.replace(final)
            _sync(self.directory)
            for old in self.complete()[: -self.keep]:
                shutil.rmtree(old)
        dist.barrier()
        return final

    def load_newest(self, state: dict[str, Any]) -> int:
        """Fills `state` in place from the newest checkpoint and returns its step; 0 when there is none."""
        found = self.complete()
        if not found:
            return 0
        dcp.load(state, checkpoint_id=found[-1])
        match = NAME.fullmatch(found[-1].name)
        assert match
        return int(match[1])


def _sync(directory: Path) -> None:
    """Makes a rename in the folder survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
