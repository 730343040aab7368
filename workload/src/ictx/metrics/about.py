"""about.json: what a run is, beside the metrics.jsonl to which it logs its progress."""

from __future__ import annotations

import json
from pathlib import Path

from ictx.folder import write_whole


def write_about(directory: Path, stage: str, model: str, steps: int, parameters: int) -> None:
    """Writes about.json, whole or not at all.

    Args:
        directory: folder of the run.
        stage: what kind of training it is, such as `pretrain`.
        model: name of the model, as it is registered.
        steps: optimizer steps that the run is to have in the end.
        parameters: size of the model.
    """
    content = {"stage": stage, "model": model, "steps": steps, "parameters": parameters}
    write_whole(directory / "about.json", json.dumps(content) + "\n")
