"""The prepared data that a run reads, checked before it does."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from ictx.data.config import DataConfig
from ictx.data.trust import Trusting, trusted_files
from ictx.errors import UserError
from ictx.manifest import Entry, Unusable, check_files
from ictx.train.ranks import on_all, on_first


def checked(config: DataConfig) -> list[Path]:
    """Returns the folders with prepared data; every rank calls it and reads a part of the files.

    Raises UserError unless they are of somebody who is trusted, and what was written.
    """
    return [checked_folder(directory, config) for directory in config.dirs]


def checked_folder(directory: Path, config: Trusting) -> Path:
    """Does the same for one folder, of whatever kind of data."""
    directory = directory.resolve()

    def files() -> dict[str, Entry]:
        try:
            return trusted_files(directory, config)
        except Unusable as error:
            raise UserError(f"{error}; to train on data of one's own: ictx data prepare") from error

    found = on_first(files)
    largest_first = sorted(found, key=lambda name: (-(found[name].size or 0), name))
    share = {name: found[name] for name in largest_first[dist.get_rank() :: dist.get_world_size()]}
    on_all(lambda: check_files(directory, share))
    return directory
