"""Tracking of a run in MLflow: one MLflow run per job, also after restarts, and one registered version per run."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from ictx.folder import write_whole
from ictx.registry import IMAGE_TAG, SUMS_TAG, VERSION_TAG, reason, write_sums
from ictx.settings import flatten
from ictx.track.config import DEFAULTS, TrackConfig
from ictx.track.lineage import UNKNOWN, Lineage

T = TypeVar("T")

# Tags of a run from environment variables.
TAGS = {
    IMAGE_TAG: "ICTX_IMAGE_DIGEST",
    "ictx.image_ref": "ICTX_IMAGE_REF",
    "ictx.git_commit": "ICTX_GIT_COMMIT",
    "slurm.cluster": "SLURM_CLUSTER_NAME",
    "slurm.job_id": "SLURM_JOB_ID",
    "slurm.nodelist": "SLURM_JOB_NODELIST",
    "slurm.restart_count": "SLURM_RESTART_COUNT",
}


# Errors that a retry may resolve: the server is down, restarting or busy. Others (a wrong password) are permanent.
PASSING = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}
SECONDS_BETWEEN_TRIES = 5.0


def passing(error: MlflowException) -> bool:
    """Returns whether a retry may succeed."""
    return error.error_code in PASSING


def patiently(call: Callable[[], T], seconds: float) -> T:
    """Returns the call's result; retries transient errors for `seconds`."""
    end, reported = time.monotonic() + seconds, False
    while True:
        try:
            return call()
        except MlflowException as error:
            if not passing(error) or time.monotonic() + SECONDS_BETWEEN_TRIES > end:
                raise
            if not reported:
                print(f"MLflow does not answer ({reason(error)}): trying for {seconds:.0f} s", flush=True)
                reported = True
        time.sleep(SECONDS_BETWEEN_TRIES)


def names_to_try(name: str) -> Iterator[str]:
    """Yields a name, then alternatives in case another user owns it (with user accounts, the creator is the owner)."""
    yield name
    if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        yield f"{name}-{user}"
        # Another user may own that name too.
        yield f"{name}-{user}-{secrets.token_hex(4)}"


def own(name: str, call: Callable[[str], T]) -> tuple[str, T]:
    """Returns the first of the names that this user may write to, and the call's result for it."""
    *others, last = names_to_try(name)
    for each in others:
        try:
            return each, call(each)
        except MlflowException as error:
            if error.error_code != "PERMISSION_DENIED":
                raise
            print(f"MLflow: {each} belongs to another user", flush=True)
    return last, call(last)


@contextmanager
def _request_timeout(seconds: int) -> Iterator[None]:
    """Raises the request timeout, because the server stores a whole file before it responds."""
    before = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(max(seconds, int(before)))
    try:
        yield
    finally:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = before


def _run_id(note: Path) -> str:
    """Returns the id in a note; empty if it is missing or invalid (full disk)."""
    try:
        found = note.read_text().strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return ""
    return found if re.fullmatch("[0-9A-Za-z-]+", found) else ""


def new_client() -> MlflowClient:
    """Returns a client without retries, because all ranks wait for its requests; see `patiently` for retries."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return MlflowClient()


class Tracker:
    """Logs to the server or store in MLFLOW_TRACKING_URI: the sink of an outbox, and the model registry."""

    name, failure = "MLflow", MlflowException

    def __init__(
        self,
        directory: Path,
        experiment: str,
        settings: Mapping[str, Any],
        patience: float,
        lineage: Lineage = UNKNOWN,
        track: TrackConfig = DEFAULTS,
    ) -> None:
        """Continues the run whose id is stored in `directory`, or creates one; retries for up to `patience` seconds.

        A run that continues does not wait for the server: its status and records are sent when the server responds.
        """
        self.client = new_client()
        self.experiment, self.patience, self.lineage, self.track = experiment, patience, lineage, track
        self.run_name = track.name or os.environ.get("SLURM_JOB_ID", directory.name)
        if lineage.parent and not track.name:
            self.run_name += f" {lineage.stage}"
        self.model = ""
        self._announced = self._uploaded = False
        note = directory / "mlflow_run_id"
        self.run_id = _run_id(note)
        if not self.run_id:
            self.run_id = self._begin(settings)
            write_whole(note, self.run_id + "\n")
            patiently(self._announce, patience)

    def patiently(self, call: Callable[[], T]) -> T:
        """Returns the call's result; retries transient errors for `patience` seconds."""
        return patiently(call, self.patience)

    def reason(self, error: Exception) -> str:
        """Returns an error's cause in one line."""
        return reason(error)

    @property
    def tags(self) -> dict[str, str]:
        """Tags of this start of the run."""
        return {tag: os.environ[name] for tag, name in TAGS.items() if os.environ.get(name)} | self.lineage.tags

    @property
    def url(self) -> str:
        """URL of the run's page; empty without a server."""
        found = re.fullmatch(r"(https?://)(?:[^/]*@)?(.*[^/])/*", os.environ.get("MLFLOW_TRACKING_URI", ""))
        return f"{found[1]}{found[2]}/#/runs/{self.run_id}" if found else ""

    def _begin(self, settings: Mapping[str, Any]) -> str:
        """Returns the id of a new run with the settings as parameters."""
        tags = {MLFLOW_PARENT_RUN_ID: self.track.parent} if self.track.parent else {}

        def create(experiment: str) -> str:
            number = patiently(lambda: self._experiment_id(experiment), self.patience)
            run = patiently(lambda: self.client.create_run(number, run_name=self.run_name, tags=tags), self.patience)
            return str(run.info.run_id)

        self.experiment, run_id = own(self.experiment, create)
        params = [Param(key, text) for key, text in flatten(settings).items()]
        patiently(lambda: self.client.log_batch(run_id, params=params), self.patience)
        return run_id

    def _experiment_id(self, name: str) -> str:
        """Returns the experiment's id; creates the experiment if it is missing."""
        found = self.client.get_experiment_by_name(name)
        if not found:
            self._create_experiment(name)
            found = self.client.get_experiment_by_name(name)
        assert found
        return str(found.experiment_id)

    def _create_experiment(self, name: str) -> None:
        """Creates the experiment. The embedded store keeps artifacts beside its database."""
        uri = os.environ.get("MLFLOW_TRACKING_URI", "")
        place = Path(uri.removeprefix("sqlite:///")).parent / "artifacts" / name
        artifacts = place.as_uri() if uri.startswith("sqlite:///") else None
        try:
            self.client.create_experiment(name, artifact_location=artifacts)
        except MlflowException as error:
            # Another job created it meanwhile.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _announce(self) -> None:
        """Logs once per start that the run continues, with its URL."""
        if not self._announced:
            self.client.update_run(self.run_id, status="RUNNING")
            self.tag(self.tags)
            if inputs := self.lineage.inputs:
                self.client.log_inputs(self.run_id, inputs)
            self._announced = True

    def tag(self, tags: Mapping[str, str]) -> None:
        """Sets tags of the run."""
        self.client.log_batch(self.run_id, tags=[RunTag(name, text) for name, text in tags.items()])

    def log(self, records: list[Mapping[str, float]]) -> None:
        """Logs records, each with `step` and `time` (Unix seconds); repeated records are ignored."""
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
        """Registers the run's exported model and sets the alias; returns the version.

        `self.model` is its name, which differs from `name` if another user owns that. Idempotent: a job that is killed
        after the registration does not register again when it restarts.
        """
        digest = write_sums(directory)
        with _request_timeout(1800):
            self.model, version = own(
                name, lambda each: patiently(lambda: self._register(directory, each, alias, digest), self.patience)
            )
        return version

    def _register(self, directory: Path, name: str, alias: str, digest: str) -> str:
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self.client.get_run(self.run_id).info.artifact_uri}/model"
        versions = self.client.search_model_versions(f"name = '{name}' and run_id = '{self.run_id}'")
        # Another user can set this run as a version's run_id, but not its files as the source.
        version = next((str(each.version) for each in versions if each.source == source), "")
        if not version:
            if not self._uploaded:
                self.client.log_artifacts(self.run_id, str(directory), "model")
                self._uploaded = True
            tags = {SUMS_TAG: digest, IMAGE_TAG: os.environ.get("ICTX_IMAGE_DIGEST", "")} | self.lineage.tags
            version = str(self.client.create_model_version(name, source, self.run_id, tags=tags).version)
        self.client.set_registered_model_alias(name, alias, version)
        self.client.set_tag(self.run_id, VERSION_TAG, f"{name}/{version}")
        return version

    def finish(self, status: str) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        self._announce()
        self.client.set_terminated(self.run_id, status)
