"""The MLflow side of a run: one run per job however often it restarts, and one registered version per run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from ictx.registry import IMAGE_TAG, SUMS_TAG, VERSION_TAG, reason, write_sums

T = TypeVar("T")

# What a run is labelled with, when the environment says it.
TAGS = {
    IMAGE_TAG: "ICTX_IMAGE_DIGEST",
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


# Errors that waiting may mend: a server that is down, restarts or is busy. Others (a wrong password) stay.
PASSING = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}
SECONDS_BETWEEN_TRIES = 5.0


def passing(error: MlflowException) -> bool:
    """Returns whether the same request may succeed later."""
    return error.error_code in PASSING


def patiently(call: Callable[[], T], seconds: float) -> T:
    """Returns the call's result; one that fails for a passing reason is tried again for that long."""
    end, told = time.monotonic() + seconds, False
    while True:
        try:
            return call()
        except MlflowException as error:
            if not passing(error) or time.monotonic() + SECONDS_BETWEEN_TRIES > end:
                raise
            if not told:
                print(f"MLflow does not answer ({reason(error)}): trying for {seconds:.0f} s", flush=True)
                told = True
        time.sleep(SECONDS_BETWEEN_TRIES)


@contextmanager
def _request_timeout(seconds: int) -> Iterator[None]:
    """Lets the server take longer to answer: it stores a whole file before it does."""
    before = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(seconds, int(before)))
    try:
        yield
    finally:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = before


class Tracker:
    """Logs to the server or store that MLFLOW_TRACKING_URI names."""

    def __init__(self, directory: Path, experiment: str, settings: Mapping[str, Any], patience: float) -> None:
        """Goes on with the run whose id `directory` keeps, or begins one there; waits `patience` seconds to do so.

        A run that goes on waits for nobody: what its beginning and its end say is told when the server answers.
        """
        # All ranks wait for a request of this one, so it fails at once; trying again is ours.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        self.client = MlflowClient()
        self.experiment, self.patience = experiment, patience
        self._announced = False
        note = directory / "mlflow_run_id"
        if note.exists():
            self.run_id = note.read_text().strip()
        else:
            self.run_id = self._begin(directory, settings)
            note.write_text(self.run_id + "\n")
            patiently(self._announce, patience)

    def _begin(self, directory: Path, settings: Mapping[str, Any]) -> str:
        """Returns the id of a new run with the settings as parameters."""
        experiment = patiently(self._experiment_id, self.patience)
        name = os.environ.get("SLURM_JOB_ID", directory.name)
        run = patiently(lambda: self.client.create_run(experiment, run_name=name), self.patience)
        run_id = str(run.info.run_id)
        params = [Param(key, text) for key, text in flatten(settings).items()]
        patiently(lambda: self.client.log_batch(run_id, params=params), self.patience)
        return run_id

    def _experiment_id(self) -> str:
        """Returns the experiment's id; creates the experiment when there is none."""
        found = self.client.get_experiment_by_name(self.experiment)
        if not found:
            self._create_experiment()
            found = self.client.get_experiment_by_name(self.experiment)
        assert found
        return str(found.experiment_id)

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

    def _announce(self) -> None:
        """Says that the run goes on, and where; once a start."""
        if not self._announced:
            self.client.update_run(self.run_id, status="RUNNING")
            tags = [RunTag(tag, os.environ[name]) for tag, name in TAGS.items() if name in os.environ]
            self.client.log_batch(self.run_id, tags=tags)
            self._announced = True

    def log(self, records: list[Mapping[str, float]]) -> None:
        """Logs records, each with its `step` and `time` (seconds since 1970); one that is logged twice counts once."""
        self._announce()
        metrics = [
            Metric(name, value, int(record["time"] * 1000), int(record["step"]))
            for record in records
            for name, value in record.items()
            if name not in ("step", "time")
        ]
        for first in range(0, len(metrics), 1000):
            self.client.log_batch(self.run_id, metrics=metrics[first : first + 1000])

    def register(self, directory: Path, name: str, alias: str) -> str:
        """Returns the version under which the run's exported model is registered; the alias points to it.

        Idempotent: a job that ends right after it registered does not register again when it restarts.
        """
        digest = write_sums(directory)
        with _request_timeout(1800):
            return patiently(lambda: self._register(directory, name, alias, digest), self.patience)

    def _register(self, directory: Path, name: str, alias: str, digest: str) -> str:
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
            tags = {SUMS_TAG: digest, IMAGE_TAG: os.environ.get("ICTX_IMAGE_DIGEST", "")}
            version = str(self.client.create_model_version(name, source, self.run_id, tags=tags).version)
        self.client.set_tag(self.run_id, VERSION_TAG, f"{name}/{version}")
        self.client.set_registered_model_alias(name, alias, version)
        return version

    def finish(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        self._announce()
        self.client.set_terminated(self.run_id, status)
