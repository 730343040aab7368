"""Downloads a registered version's files: verifies each file's checksum, and resumes after an interruption."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts, list_artifacts

from ictx.errors import UserError
from ictx.registry import PROMOTED_TAG, SUMS_FILE, SUMS_TAG, ModelRef, read_sums, sha256

STATE_FILE = ".ictx-model.json"
"""File in a complete folder: the version that it contains, and the checksums that were verified."""


@dataclass(frozen=True)
class Source:
    """A version's files in the registry."""

    ref: ModelRef
    version: str
    uri: str
    sums_digest: str
    """SHA-256 of SUMS_FILE; empty if the version was registered without it."""
    promoted: dict[str, str] = field(default_factory=dict)
    """Path → SHA-256 as verified at promotion; empty if the version was never promoted."""

    @classmethod
    def find(cls, client: MlflowClient, ref: ModelRef) -> Source:
        """Queries the registry for a version. Raises UserError."""
        found = ref.find(client)
        uri = client.get_model_version_download_uri(ref.name, found.version)
        tags = found.tags or {}
        promoted = read_sums(tags.get(PROMOTED_TAG, ""))
        return cls(ref, str(found.version), uri.rstrip("/"), tags.get(SUMS_TAG, ""), promoted)

    def sizes(self) -> dict[str, int]:
        """Returns path → bytes of all files."""
        found: dict[str, int] = {}
        folders = [self.uri]
        while folders:
            for entry in list_artifacts(artifact_uri=(folder := folders.pop())):
                place = f"{folder}/{Path(entry.path).name}"
                if entry.is_dir:
                    folders.append(place)
                else:
                    found[place.removeprefix(f"{self.uri}/")] = int(entry.file_size or 0)
        return found

    def fetch(self, path: str, directory: Path) -> None:
        """Downloads a file to `directory/path`."""
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        download_artifacts(artifact_uri=f"{self.uri}/{path}", dst_path=str(target.parent))


def held_version(target: Path) -> tuple[str, str] | None:
    """Returns name and version of the model in a folder; None if it is incomplete or was changed."""
    try:
        state = json.loads((target / STATE_FILE).read_text())
        sums = dict(state["sha256"])
        whole = all((target / path).is_file() and sha256(target / path) == digest for path, digest in sums.items())
        return (state["name"], state["version"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def write_state(directory: Path, name: str, version: str, sums: Mapping[str, str]) -> None:
    """Writes STATE_FILE of a complete folder, which `held_version` reads."""
    state = {"name": name, "version": version, "sha256": dict(sums)}
    (directory / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")


def fetch_all(source: Source, draft: Path, say: Callable[[str], None] = print) -> dict[str, str]:
    """Downloads the version's files to `draft`, writes STATE_FILE there, and returns path → SHA-256.

    Files with the right checksum from an interrupted call are not downloaded again; `say` receives log lines.
    Raises UserError.
    """
    draft.mkdir(exist_ok=True)
    sizes = source.sizes()
    sums = _sums(source, draft, sizes)
    if not sums:
        say(f"registered without {SUMS_FILE}: verifying only sizes and structure, not checksums")
    wanted = sorted(sums or sizes)
    if not wanted:
        raise UserError(f"{source.ref} is version {source.version}, which has no files at {source.uri}")
    for file in sorted(draft.rglob("*")):
        # Left by an interrupted pull of another version.
        if file.is_file() and file.relative_to(draft).as_posix() not in wanted:
            file.unlink()
    missing = [path for path in wanted if not _verified(draft / path, sizes[path], sums.get(path))]
    if len(missing) < len(wanted):
        say(f"{len(wanted) - len(missing)} of {len(wanted)} files exist from an interrupted pull")
    _check_space(draft, sum(sizes[path] for path in missing))
    for path in missing:
        began = time.monotonic()
        source.fetch(path, draft)
        if (draft / path).stat().st_size != sizes[path]:
            raise UserError(
                f"{source.ref}: only {(draft / path).stat().st_size} of {sizes[path]} bytes of {path} arrived: retry"
            )
        if sums and sha256(draft / path) != sums[path]:
            (draft / path).unlink()
            raise UserError(
                f"{source.ref}: {path} of version {source.version} does not have the checksum {_origin(source)}: "
                "the registered file is damaged or was changed; promote another version"
            )
        say(f"downloaded {path}, {sizes[path] / 1e6:,.1f} MB in {time.monotonic() - began:.1f} s")
    sums = sums or {path: sha256(draft / path) for path in wanted}
    write_state(draft, source.ref.name, source.version, sums)
    return sums


def _sums(source: Source, draft: Path, sizes: dict[str, int]) -> dict[str, str]:
    """Returns path → SHA-256; empty for a version without checksums. Raises UserError if a listed file is missing.

    Checksums recorded at promotion take precedence over SUMS_FILE, which the version's owner can replace.
    """
    sums = source.promoted or _listed_sums(source, draft, sizes)
    for path in sums:
        if path not in sizes:
            raise UserError(
                f"{source.ref}: version {source.version} lacks {path}, which {_origin(source, 'lists')}: "
                "promote another version"
            )
    return sums


def _origin(source: Source, lists: str = "") -> str:
    """Returns the source of the checksums, for a message."""
    if source.promoted:
        return "its promotion recorded" if lists else "that its promotion recorded"
    return f"its {SUMS_FILE} {lists}" if lists else f"in its {SUMS_FILE}"


def _listed_sums(source: Source, draft: Path, sizes: dict[str, int]) -> dict[str, str]:
    """Returns the checksums in SUMS_FILE; empty for a version without it."""
    if SUMS_FILE not in sizes:
        if source.sums_digest:
            raise UserError(
                f"{source.ref}: the {SUMS_FILE} of version {source.version} is missing: promote another version"
            )
        return {}
    source.fetch(SUMS_FILE, draft)
    file = draft / SUMS_FILE
    if source.sums_digest and sha256(file) != source.sums_digest:
        raise UserError(
            f"{source.ref}: {SUMS_FILE} of version {source.version} does not have the checksum in the registry: "
            "promote another version"
        )
    return read_sums(file.read_text())


def _verified(file: Path, size: int, digest: str | None) -> bool:
    """Returns whether a file exists with this size and SHA-256."""
    if not file.is_file() or file.stat().st_size != size:
        return False
    return digest is not None and sha256(file) == digest


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(f"{directory} has {free / 1e9:.1f} GB free, the model needs {needed / 1e9:.1f} GB more")
