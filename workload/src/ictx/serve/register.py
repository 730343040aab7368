"""`ictx register`: a model that no run of ours made becomes a version of the registry, such as one that judges."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ictx.errors import UserError
from ictx.model.hf_config import CONFIG_FILE
from ictx.track.mlflow import Tracker

EXPERIMENT = "registered"


def register(folder: Path, model: str, alias: str) -> str:
    """Returns what was done, in words: the folder's files are the newest version of `model`, and `alias` is it.

    SHA256SUMS is written beside them. Raises UserError for a folder without a model.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder} is no model's folder: it has no {CONFIG_FILE}")
    with tempfile.TemporaryDirectory(prefix="ictx-register-") as notes:
        tracker = Tracker(Path(notes), EXPERIMENT, {"folder": str(folder.resolve())}, patience=60.0)
        try:
            version = tracker.register(folder, model, alias)
        except BaseException:
            tracker.finish("FAILED")
            raise
        tracker.finish("FINISHED")
    return f"models:/{tracker.model}@{alias} is version {version} now"
