"""Registered models, as training and serving use them: references, tags, and checksums of files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Disables MLflow's telemetry; must be set before the import, which reads it.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from ictx.errors import UserError
from ictx.manifest import SHA256, digest, hash_files, list_files

SUMS_FILE = "SHA256SUMS"
"""File beside a model's files that lists them in the format of `sha256sum`."""
SUMS_TAG = "ictx.sha256sums"
"""Tag of a registered version: the SHA-256 of its SUMS_FILE, which thereby covers all of its files."""
PROMOTED_TAG = "ictx.promoted.sha256sums"
"""Tag of a promoted version: the checksums of its files, as verified at promotion. Only promoters can write it,
not the model's owners."""
FORCED_TAG, OVERRULED_TAG = "ictx.promoted.forced", "ictx.promoted.overruled"
"""Tags of a version that was promoted with --force: by whom and why, and the policy's objections."""
EVAL_TAG = "ictx.eval."
"""Prefix of a version's evaluation tags: METRIC, KIND.measured, KIND.run_id."""
IMAGE_TAG = "ictx.image_digest"
"""Tag of a run: digest of the training image."""
VERSION_TAG = "ictx.model_version"
"""Tag of a run: the version that it registered."""
STAGE_TAG, PARENT_TAG, DATA_TAG = "ictx.stage", "ictx.parent_version", "ictx.data_fingerprint"
"""Tags of a run and of its version: training stage, initial model (`NAME/VERSION`), and data fingerprint."""
IMAGE_REF_TAG = "ictx.image"
"""Tag of a run and of its version: the training image, `REFERENCE@DIGEST`."""


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal. Raises Unusable if it is not a regular file."""
    return digest(path).sha256


def write_sums(directory: Path) -> str:
    """Writes SUMS_FILE for the files below the folder; returns the SHA-256 of SUMS_FILE."""
    files = hash_files(directory, sorted(list_files(directory) - {SUMS_FILE}))
    target = directory / SUMS_FILE
    target.write_text(format_sums({name: entry.sha256 for name, entry in files.items()}))
    return sha256(target)


def format_sums(sums: Mapping[str, str]) -> str:
    """Returns path → SHA-256 in the format of `sha256sum`. Raises UserError for file names with line breaks."""
    text = "".join(f"{checksum}  {path}\n" for path, checksum in sorted(sums.items()))
    if read_sums(text) != sums:
        odd = [path for path in sums if len(path.splitlines()) > 1]
        raise UserError(f"a model's file has a line break in its name: {', '.join(map(repr, odd))}")
    return text


def read_sums(text: str) -> dict[str, str]:
    """Returns path → SHA-256 from the text of SUMS_FILE. Raises UserError for an invalid line."""
    sums: dict[str, str] = {}
    for line in text.splitlines():
        checksum, _, path = line.partition("  ")
        inside = path == PurePosixPath(path).as_posix() and path[:1] not in ("", "/") and path != "."
        if not SHA256.fullmatch(checksum) or not inside or ".." in PurePosixPath(path).parts or path in sums:
            raise UserError(
                f"{SUMS_FILE} has an invalid line: {line[:80]!r}: expected a SHA-256, two spaces and a path"
            )
        sums[path] = checksum
    return sums


@dataclass(frozen=True)
class ModelRef:
    """Reference to a version of a registered model, by number or by alias."""

    name: str
    version: str = ""
    alias: str = ""

    @classmethod
    def parse(cls, uri: str) -> ModelRef:
        """Parses `models:/<name>@<alias>` or `models:/<name>/<version>`. Raises UserError."""
        match = re.fullmatch(r"models:/([^/@:]+)(?:@([A-Za-z0-9._-]+)|/([0-9]+))", uri)
        if not match:
            raise UserError(f"{uri!r} is not a model: expected models:/<name>@<alias> or models:/<name>/<version>")
        return cls(match[1], version=match[3] or "", alias=match[2] or "")

    def __str__(self) -> str:
        return f"models:/{self.name}@{self.alias}" if self.alias else f"models:/{self.name}/{self.version}"

    def find(self, client: MlflowClient) -> ModelVersion:
        """Returns the registered version. Raises UserError if it does not exist or its registration is incomplete."""
        try:
            if self.alias:
                found = client.get_model_version_by_alias(self.name, self.alias)
            else:
                found = client.get_model_version(self.name, self.version)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise UserError(f"{self} does not exist: {_first_line(error)}") from error
        if found.status != "READY":
            raise UserError(f"{self} is version {found.version}, whose status is {found.status}: expected READY")
        return found


def new_client() -> MlflowClient:
    """Returns a client that stops retrying after about 15 seconds, because the caller retries the whole command."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return MlflowClient()


@contextmanager
def explained() -> Iterator[None]:
    """Converts errors of MLflow's client into a UserError with the server's URL."""
    try:
        yield
    except MlflowException as error:
        raise as_user_error(error) from error


def as_user_error(error: MlflowException) -> UserError:
    """Returns a UserError with the server's URL and the cause."""
    return UserError(f"MLFLOW_TRACKING_URI is {os.environ.get('MLFLOW_TRACKING_URI', '')!r}: {reason(error)}")


def reason(error: Exception) -> str:
    """Returns the cause of an error, rephrased if MLflow's text has only internals of its HTTP client."""
    text = _first_line(error)
    for sign, words in {
        "Connection refused": "connection refused (is the server running?)",
        "Name or service not known": "the host name cannot be resolved",
        "Temporary failure in name resolution": "the host name cannot be resolved",
        "No route to host": "no route to the host",
        "imed out": "the request timed out",
        "error code 401": "wrong user name or password (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)",
        "error code 403": "it does not exist, or this user has no permission for it",
    }.items():
        if sign in str(error):
            return words
    return text


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
