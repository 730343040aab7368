"""Verification of a run's prepared data before training."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from ictx.data.config import DataConfig
from ictx.data.trust import Trusting, trusted_files
from ictx.errors import UserError
from ictx.manifest import Entry, Unusable, check_files
from ictx.train.ranks import on_all, on_first


def checked(config: DataConfig) -> list[Path]:
    """Returns the folders with prepared data; every rank calls it and verifies a part of the files.

    Raises UserError unless their owner is trusted and the files match their manifests.
    """
    return [checked_folder(directory, config) for directory in config.dirs]


def checked_folder(directory: Path, config: Trusting) -> Path:
    """Like `checked`, for one folder of any kind of data."""
    directory = directory.resolve()

    def files() -> dict[str, Entry]:
        try:
            return trusted_files(directory, config)
        except Unusable as error:
            raise UserError(f"{error}; prepare your own data with ictx data prepare") from error

    found = on_first(files)
    largest_first = sorted(found, key=lambda name: (-(found[name].size or 0), name))
    share = {name: found[name] for name in largest_first[dist.get_rank() :: dist.get_world_size()]}
    on_all(lambda: check_files(directory, share))
    return directory
