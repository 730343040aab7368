"""The MLflow side of a run: one run per job however often it restarts, and one registered version per run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Before the import, which reads it: MLflow would report its use to its makers.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

# What a run is labelled with, when the environment says it.
TAGS = {
    "ictx.image_digest": "ICTX_IMAGE_DIGEST",
    "ictx.image_ref": "ICTX_IMAGE_REF",
    "ictx.git_commit": "ICTX_GIT_COMMIT",
    "slurm.cluster": "SLURM_CLUSTER_NAME",
    "slurm.job_id": "SLURM_JOB_ID",
    "slurm.nodelist": "SLURM_JOB_NODELIST",
    "slurm.restart_count": "SLURM_RESTART_COUNT",
}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns nested settings as `section.key`: text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": str(value)}
    return flat


class Tracker:
    """Logs to the server or store that MLFLOW_TRACKING_URI names."""

    def __init__(self, directory: Path, experiment: str, settings: Mapping[str, Any]) -> None:
        """Goes on with the run whose id `directory` keeps, or begins one there."""
        self.client = MlflowClient()
        note = directory / "mlflow_run_id"
        self.experiment = experiment
        if note.exists():
            self.run_id = note.read_text().strip()
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = self._begin(directory, settings)
            note.write_text(self.run_id + "\n")
        tags = [RunTag(tag, os.environ[name]) for tag, name in TAGS.items() if name in os.environ]
        self.client.log_batch(self.run_id, tags=tags)

    def _begin(self, directory: Path, settings: Mapping[str, Any]) -> str:
        """Returns the id of a new run with the settings as parameters."""
        found = self.client.get_experiment_by_name(self.experiment)
        if not found:
            self._create_experiment()
            found = self.client.get_experiment_by_name(self.experiment)
        assert found
        run = self.client.create_run(found.experiment_id, run_name=os.environ.get("SLURM_JOB_ID", directory.name))
        run_id = str(run.info.run_id)
        self.client.log_batch(run_id, params=[Param(name, text) for name, text in flatten(settings).items()])
        return run_id

    def _create_experiment(self) -> None:
        """Creates the experiment. The embedded store keeps artifacts beside its database."""
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        place = Path(uri.removeprefix("sqlite:///")).parent / "artifacts" / self.experiment
        artifacts = place.as_uri() if uri.startswith("sqlite:///") else None
        try:
            self.client.create_experiment(self.experiment, artifact_location=artifacts)
        except MlflowException as error:
            # Another job created it in the meantime.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def log(self, records: list[Mapping[str, float]]) -> None:
        """Logs records, each with its `step`."""
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, int(record["step"]))
            for record in records
            for name, value in record.items()
            if name != "step"
        ]
        for first in range(0, len(metrics), 1000):
            self.client.log_batch(self.run_id, metrics=metrics[first : first + 1000])

    def register(self, directory: Path, name: str, alias: str) -> str:
        """Returns the version under which the run's exported model is registered; the alias points to it.

        Idempotent: a job that ends right after it registered does not register again when it restarts.
        """
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = self.client.search_model_versions(f"name = '{name}' and run_id = '{self.run_id}'")
        if versions:
            version = str(versions[0].version)
        else:
            self.client.log_artifacts(self.run_id, str(directory), "model")
            source = f"{self.client.get_run(self.run_id).info.artifact_uri}/model"
            version = str(self.client.create_model_version(name, source, self.run_id).version)
        self.client.set_registered_model_alias(name, alias, version)
        return version

    def finish(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)
