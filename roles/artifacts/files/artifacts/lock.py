"""The lock file: external artifacts, their sources, and their checksums or keys."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from datetime import date
from pathlib import Path
from urllib.parse import quote, urlsplit

import yaml

KINDS = ("file", "image", "apt", "wheels")


class ArtifactError(Exception):
    """An error message in one line: the artifact, the problem, and the remedy."""


@dataclass(frozen=True)
class Artifact:
    """One entry of the lock; playbooks/vars/artifacts.yml describes the fields."""

    name: str
    version: str
    kind: str
    url: str
    path: str
    licence: str
    looked_at: date
    end_of_life: date | None
    newest: str
    why: str
    sha256: str | None = None
    unverified: str = ""
    fingerprints: list[str] = field(default_factory=list)
    suite: str = ""
    component: str = ""
    architecture: str = "amd64"
    key: str = ""
    key_path: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    python: str = ""

    @property
    def host(self) -> str:
        """Host that publishes it; for wheels without a URL, the index of pip's configuration."""
        return urlsplit(self.url).hostname or self.url.split("/")[0] or "pip's index"

    @property
    def outdated(self) -> str:
        """The newer version and a passed end of life; empty if there is neither."""
        found = [] if self.newest == self.version else [f"{self.newest} is known"]
        if self.end_of_life and self.end_of_life < date.today():
            found.append(f"end of life {self.end_of_life}")
        return ", ".join(found)

    def source(self, mirror: str) -> str:
        """Returns the URL to download from: the publisher's, or that of another mirror with the same layout."""
        return f"{mirror.rstrip('/')}/{quote(self.path)}" if mirror else self.url


def _problem(entry: dict[str, object]) -> str:
    """Returns which field of an entry is unknown, absent or of the wrong type; empty if none is."""
    known = {each.name: each for each in fields(Artifact)}
    if unknown := set(entry) - set(known):
        return f"has the unknown field {min(map(str, unknown))}: remove it"
    required = {name for name, each in known.items() if each.default is MISSING and each.default_factory is MISSING}
    if absent := required - set(entry):
        return f"has no {min(absent)}: add it"
    for name, value in entry.items():
        wanted = str(known[name].type)
        kind = {"date": date, "list": list, "dict": dict}.get(wanted.split(" ")[0].split("[")[0], str)
        if not (isinstance(value, kind) or (value is None and "None" in wanted)):
            form = {date: "a date: write YYYY-MM-DD without quotes", str: "text: quote it"}.get(
                kind, f"a {kind.__name__}"
            )
            return f"has the {name} {value!r}, which is not {form}"
    if not all(entry[name] for name in ("name", "version", "licence")):
        return "has an empty name, version or licence: set it"
    if entry.get("sha256") and not re.fullmatch("[0-9a-f]{64}", str(entry["sha256"])):
        return f"has the sha256 {entry['sha256']}: use 64 hexadecimal digits in lower case"
    return ""


def read(path: Path, names: Iterable[str] = ()) -> list[Artifact]:
    """Returns all entries of a lock file, or those with the given names.

    Raises:
        ArtifactError: an entry is not valid, or a name is unknown.
    """
    try:
        entries = yaml.safe_load(path.read_text())["artifacts_lock"]
    except (OSError, TypeError, KeyError, ValueError, yaml.YAMLError) as error:
        raise ArtifactError(f"{path}: not a lock file of artifacts: {error}") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ArtifactError(f"{path}: not a lock file of artifacts: artifacts_lock is not a list of entries")
    for number, entry in enumerate(entries, 1):
        if problem := _problem(entry):
            raise ArtifactError(f"{path}: {entry.get('name', f'entry {number}')} {problem}")
    found = [Artifact(**entry) for entry in entries]
    for field_name in ("name", "path"):
        values = [getattr(each, field_name) for each in found if field_name == "name" or each.kind != "wheels"]
        if twice := {value for value in values if values.count(value) > 1}:
            raise ArtifactError(f"{path}: two entries have the {field_name} {min(twice)}: use another")
    for each in found:
        if each.kind not in KINDS:
            raise ArtifactError(f"{path}: {each.name} is of the kind {each.kind}: use one of {', '.join(KINDS)}")
        if Path(each.path).is_absolute() or ".." in Path(each.path).parts:
            raise ArtifactError(f"{path}: {each.name} has the path {each.path}: use one inside the mirror")
        if each.kind == "apt" and not each.fingerprints:
            raise ArtifactError(f"{path}: {each.name} has no fingerprints: add those of its signing keys")
        if each.kind == "wheels" and not each.python:
            raise ArtifactError(f"{path}: {each.name} has no python: set the Python version of the wheels")
        if each.kind in ("file", "image") and not each.sha256 and not each.unverified:
            raise ArtifactError(f"{path}: {each.name} has neither sha256 nor the reason in unverified")
    if unknown := set(names) - {each.name for each in found}:
        raise ArtifactError(f"{path} does not have {', '.join(sorted(unknown))}: see the command table")
    return [each for each in found if not names or each.name in names]
