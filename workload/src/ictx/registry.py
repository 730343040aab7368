"""What training and serving agree on about registered models: names of versions, and checksums of their files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Before the import, which reads it: MLflow would report its use to its makers.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from ictx.errors import UserError
from ictx.manifest import SHA256, digest, hash_files, list_files

SUMS_FILE = "SHA256SUMS"
"""Lies beside a model's files and lists them, as `sha256sum` does."""
SUMS_TAG = "ictx.sha256sums"
"""Tag of a registered version: the SHA-256 of its SUMS_FILE, so that the registry vouches for all of its files."""
PROMOTED_TAG = "ictx.promoted.sha256sums"
"""Tag of a version that was promoted: the checksums of its files, as the promoter verified them. Only promoters may
write it: the server refuses others, those who own the model included."""
FORCED_TAG, OVERRULED_TAG = "ictx.promoted.forced", "ictx.promoted.overruled"
"""Tags of a version that was promoted against the policy: who did it and why, and what the policy reported."""
EVAL_TAG = "ictx.eval."
"""Begins the tags of a version that record how it was evaluated: METRIC, KIND.measured, KIND.run_id."""
IMAGE_TAG = "ictx.image_digest"
"""Tag of a run: the image that trained."""
VERSION_TAG = "ictx.model_version"
"""Tag of a run: what it registered."""
STAGE_TAG, PARENT_TAG, DATA_TAG = "ictx.stage", "ictx.parent_version", "ictx.data_fingerprint"
"""Tags of a run and of its version: kind of training, the model that it began with (`NAME/VERSION`), and its data."""
IMAGE_REF_TAG = "ictx.image"
"""Tag of a run and of its version: the image that trained, `REFERENCE@DIGEST`."""


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal. Raises Unusable for what is not a regular file."""
    return digest(path).sha256


def write_sums(directory: Path) -> str:
    """Writes SUMS_FILE for the files below the folder and returns its own SHA-256."""
    files = hash_files(directory, sorted(list_files(directory) - {SUMS_FILE}))
    target = directory / SUMS_FILE
    target.write_text(format_sums({name: entry.sha256 for name, entry in files.items()}))
    return sha256(target)


def format_sums(sums: Mapping[str, str]) -> str:
    """Returns path → SHA-256 as `sha256sum` lists them. Raises UserError for a name that would read as another."""
    text = "".join(f"{checksum}  {path}\n" for path, checksum in sorted(sums.items()))
    if read_sums(text) != sums:
        odd = [path for path in sums if len(path.splitlines()) > 1]
        raise UserError(f"a model's file has a line break in its name: {', '.join(map(repr, odd))}")
    return text


def read_sums(text: str) -> dict[str, str]:
    """Returns path → SHA-256 from the text of SUMS_FILE. Raises UserError for a line that is no checksum."""
    sums: dict[str, str] = {}
    for line in text.splitlines():
        checksum, _, path = line.partition("  ")
        inside = path == PurePosixPath(path).as_posix() and path[:1] not in ("", "/") and path != "."
        if not SHA256.fullmatch(checksum) or not inside or ".." in PurePosixPath(path).parts or path in sums:
            raise UserError(f"{SUMS_FILE} has a line that is no checksum of a file: {line[:80]!r}")
        sums[path] = checksum
    return sums


@dataclass(frozen=True)
class ModelRef:
    """A registered model's version, by number or by alias."""

    name: str
    version: str = ""
    alias: str = ""

    @classmethod
    def parse(cls, uri: str) -> ModelRef:
        """Reads `models:/<name>@<alias>` or `models:/<name>/<version>`. Raises UserError."""
        match = re.fullmatch(r"models:/([^/@:]+)(?:@([A-Za-z0-9._-]+)|/([0-9]+))", uri)
        if not match:
            raise UserError(f"{uri!r} names no model: expected models:/<name>@<alias> or models:/<name>/<version>")
        return cls(match[1], version=match[3] or "", alias=match[2] or "")

    def __str__(self) -> str:
        return f"models:/{self.name}@{self.alias}" if self.alias else f"models:/{self.name}/{self.version}"

    def find(self, client: MlflowClient) -> ModelVersion:
        """Returns the registered version. Raises UserError when there is none, or its registration never ended."""
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
    """Returns a client that stops retrying after a quarter of a minute: whoever starts the command tries again."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return MlflowClient()


@contextmanager
def explained() -> Iterator[None]:
    """Turns what MLflow's client raises into a UserError of one line that names the server."""
    try:
        yield
    except MlflowException as error:
        raise as_user_error(error) from error


def as_user_error(error: MlflowException) -> UserError:
    """Returns the error that names the server and what is wrong."""
    return UserError(f"MLFLOW_TRACKING_URI is {os.environ.get('MLFLOW_TRACKING_URI', '')!r}: {reason(error)}")


def reason(error: Exception) -> str:
    """Returns what went wrong, rephrased where MLflow shows internals of its HTTP client."""
    text = _first_line(error)
    for sign, words in {
        "Connection refused": "nothing listens there (connection refused)",
        "Name or service not known": "the host's name is unknown",
        "Temporary failure in name resolution": "the host's name is unknown",
        "No route to host": "no route to the host",
        "imed out": "no answer in time",
        "error code 401": "the name or the password is wrong (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD)",
        "error code 403": "there is no such thing, or this user may not see or change it",
    }.items():
        if sign in str(error):
            return words
    return text


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
