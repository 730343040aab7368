"""about.json: describes a run, beside its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

from ictx.folder import write_whole


def write_about(directory: Path, stage: str, model: str, steps: int, parameters: int) -> None:
    """Writes about.json atomically.

    Args:
        directory: folder of the run.
        stage: training stage, such as `pretrain`.
        model: name of the registered model.
        steps: planned optimizer steps.
        parameters: number of parameters of the model.
    """
    content = {"stage": stage, "model": model, "steps": steps, "parameters": parameters}
    write_whole(directory / "about.json", json.dumps(content) + "\n")
