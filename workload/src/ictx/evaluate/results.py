"""Results of evaluations: a file in the folder; for registered models also tags, metrics and artifacts in MLflow."""

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
"""Seconds for which requests are retried while the tracking server does not respond."""


@dataclass(frozen=True)
class Result:
    """Result of an evaluation."""

    kind: str
    """Kind of evaluation: `perplexity`, `needle`, …"""
    model: str
    """Evaluated model: `models:/NAME/VERSION`, a folder or an endpoint."""
    measured: Mapping[str, Any]
    """Settings that the metrics depend on besides the model: results with equal ones are comparable."""
    metrics: Mapping[str, float]
    """Metrics; NAME_low and NAME_high are the bounds of NAME's 95 % interval."""
    details: Mapping[str, Any]
    """Tables of detailed results."""
    created: float = field(default_factory=lambda: round(time.time(), 3))
    """Unix time in seconds."""

    @property
    def fingerprint(self) -> str:
        """Hash of `measured`: equal if metrics are comparable."""
        return hashlib.sha256(json.dumps(self.measured, sort_keys=True).encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Writes RESULT_FILE."""
        write_whole(folder / RESULT_FILE, json.dumps(_finite(asdict(self)), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Result:
        """Returns the result in a file of `write`. Raises UserError if the file is invalid."""
        try:
            return cls(**json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is not a result of `ictx eval`: {error}") from error


def _finite(value: Any) -> Any:
    """Returns the value with None for non-finite numbers, which JSON does not support."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def log(subject: Subject, result: Result, folder: Path) -> str:
    """Logs a result on the registered version; returns the id of the MLflow run with its tables and plots.

    The version's tags are `ictx.eval.METRIC` for each metric, `ictx.eval.KIND.measured` and `ictx.eval.KIND.run_id`.
    The gate of `ictx promote` compares metrics of equal fingerprints. Raises UserError.
    """
    assert subject.ref
    with explained():
        # Continues the run whose id is in the folder, as a restarted job does.
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
    """Returns the version's tags of the evaluation, without the prefix EVAL_TAG."""
    kind, against = result.kind, result.measured.get("against")
    numbers = {name: f"{value:.6g}" for name, value in result.metrics.items() if math.isfinite(value)}
    about = {f"{kind}.measured": result.fingerprint, f"{kind}.run_id": run_id}
    return numbers | about | ({f"{kind}.against": str(against)} if against else {})
