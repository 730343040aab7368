"""Sharded checkpoints that are there as a whole or not at all."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ictx.errors import UserError
from ictx.folder import sync
from ictx.model import ModelConfig, Transformer

MODEL_FILE = "model.yaml"
"""In a run's folder: the model's configuration, which its checkpoints need to be read without the run's settings."""
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
            save(state, checkpoint_id=draft)
        except CheckpointException as error:
            if dist.get_rank() == 0:
                shutil.rmtree(draft, ignore_errors=True)
            raise UserError(f"cannot write checkpoint {final}: {_cause(error)}") from error
        if dist.get_rank() == 0:
            draft.replace(final)
            sync(self.directory)
            for old in self.complete()[: -self.keep]:
                shutil.rmtree(old)
        dist.barrier()
        return final

    def load_newest(self, state: dict[str, Any]) -> int:
        """Fills `state` in place from the newest checkpoint and returns its step; 0 when there is none.

        Every rank calls it. Raises UserError naming the checkpoint when `state` has other tensors than it.
        """
        # The first rank chooses: on network storage another node may not see the newest folder yet.
        choice = [self.complete()[-1:]] if dist.get_rank() == 0 else [[]]
        dist.broadcast_object_list(choice, src=0)
        if not choice[0]:
            return 0
        newest = choice[0][0]
        try:
            load(state, checkpoint_id=newest)
        except CheckpointException as error:
            raise UserError(
                f"checkpoint {newest} does not fit this configuration ({_cause(error)}): give the settings that it was "
                "made with, or another run.dir"
            ) from error
        match = NAME.fullmatch(newest.name)
        assert match
        return int(match[1])


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one of a run's checkpoints."""
    return bool(NAME.fullmatch(path.name)) and (path / ".metadata").exists()


def load_model(path: Path) -> Transformer:
    """Returns the model of a run's checkpoint. Raises UserError when its run's MODEL_FILE does not describe it."""
    config = ModelConfig.from_yaml(path.parent.parent / MODEL_FILE)
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device="cpu")
    for router in model.routers:
        router.tokens_per_expert.zero_()
    state: dict[str, Any] = {"model": model.state_dict()}
    try:
        load(state, checkpoint_id=path, no_dist=True)
    except CheckpointException as error:
        raise UserError(f"checkpoint {path} is no model of {MODEL_FILE}: {_cause(error)}") from error
    return model.eval()


def _cause(error: CheckpointException) -> str:
    """Returns the first line of what went wrong on the lowest rank that something went wrong on."""
    return str(error.failures[min(error.failures)][0]).partition("\n")[0]
