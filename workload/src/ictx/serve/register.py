"""`ictx register`: registers a model that was not trained by ictx, such as a judge, or an adapter."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ictx.errors import UserError
from ictx.model.hf_config import CONFIG_FILE
from ictx.serve.lora import CONFIG as ADAPTER_CONFIG
from ictx.track.mlflow import Tracker

EXPERIMENT = "registered"


def register(folder: Path, model: str, alias: str) -> str:
    """Registers a folder's files as a new version of `model` and sets `alias` to it; returns a message.

    Writes SHA256SUMS into the folder. Raises UserError for a folder without a model.
    """
    if not any((folder / name).is_file() for name in (CONFIG_FILE, ADAPTER_CONFIG)):
        raise UserError(f"{folder} is not a model or adapter: it has neither {CONFIG_FILE} nor {ADAPTER_CONFIG}")
    with tempfile.TemporaryDirectory(prefix="ictx-register-") as notes:
        tracker = Tracker(Path(notes), EXPERIMENT, {"folder": str(folder.resolve())}, patience=60.0)
        try:
            version = tracker.register(folder, model, alias)
        except BaseException:
            tracker.finish("FAILED")
            raise
        tracker.finish("FINISHED")
    return f"models:/{tracker.model}@{alias} is version {version} now"
