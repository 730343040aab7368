"""What an evaluation found: a file in its folder, and tags, metrics and artifacts where the model is registered."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ictx.errors import UserError
from ictx.evaluate.subject import Subject
from ictx.folder import write_whole
from ictx.registry import EVAL_TAG, VERSION_TAG, explained
from ictx.track.mlflow import Tracker

RESULT_FILE = "result.json"
EXPERIMENT = "ictx-evals"
STAGE_TAG = "ictx.stage"
ARTIFACTS = (".json", ".jsonl", ".png", ".md", ".html")
PATIENCE = 60.0
"""Seconds for which the tracking server may be away."""


@dataclass(frozen=True)
class Result:
    """An evaluation's outcome."""

    kind: str
    """perplexity, needle, …"""
    model: str
    """What was evaluated: `models:/NAME/VERSION`, a folder or an endpoint."""
    measured: Mapping[str, Any]
    """What the numbers depend on besides the model: two results with the same can be compared."""
    metrics: Mapping[str, float]
    """The numbers; NAME_low and NAME_high are the ends of NAME's 95 % interval."""
    details: Mapping[str, Any]
    """Tables behind the numbers."""
    created: float = field(default_factory=lambda: round(time.time(), 3))
    """Seconds since 1970."""

    @property
    def fingerprint(self) -> str:
        """Names `measured`: equal where numbers can be compared."""
        return hashlib.sha256(json.dumps(self.measured, sort_keys=True).encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Writes RESULT_FILE."""
        write_whole(folder / RESULT_FILE, json.dumps(_finite(asdict(self)), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Result:
        """Returns what `write` wrote. Raises UserError where the file is something else."""
        try:
            return cls(**json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is no result of `ictx eval`: {error}") from error


def _finite(value: Any) -> Any:
    """Returns the value with None for numbers that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def log(subject: Subject, result: Result, folder: Path) -> str:
    """Logs a result on the registered version and returns the MLflow run that keeps its tables and pictures.

    The version's tags are `ictx.eval.METRIC` for each number, and `ictx.eval.KIND.measured` and `.run_id`: the gate of
    `ictx promote` compares those of one fingerprint. Raises UserError.
    """
    assert subject.ref
    with explained():
        # It goes on with the run whose id the folder keeps, as a restarted job does.
        tracker = Tracker(folder, EXPERIMENT, result.measured, patience=PATIENCE)
        finite = {name: value for name, value in result.metrics.items() if math.isfinite(value)}
        tracker.log([{**finite, "step": 0, "time": result.created}])
        client, run_id, ref = tracker.client, tracker.run_id, subject.ref
        client.set_tag(run_id, VERSION_TAG, f"{ref.name}/{ref.version}")
        client.set_tag(run_id, STAGE_TAG, "eval")
        for file in sorted(path for path in folder.iterdir() if path.suffix in ARTIFACTS):
            client.log_artifact(run_id, str(file))
        for name, value in _tags(result, run_id).items():
            client.set_model_version_tag(ref.name, ref.version, f"{EVAL_TAG}{name}", value)
        tracker.finish("FINISHED")
    return run_id


def _tags(result: Result, run_id: str) -> dict[str, str]:
    """Returns the version's tags of the evaluation, behind EVAL_TAG."""
    kind, against = result.kind, result.measured.get("against")
    numbers = {name: f"{value:.6g}" for name, value in result.metrics.items() if math.isfinite(value)}
    about = {f"{kind}.measured": result.fingerprint, f"{kind}.run_id": run_id}
    return numbers | about | ({f"{kind}.against": str(against)} if against else {})
