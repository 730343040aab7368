"""Mirrors packages of an apt repository with their dependencies, in the repository's layout.

Nodes verify them as if from the publisher: the signed index is kept unchanged; it has the checksum of the package
list, which has the checksum of each package.
"""

from __future__ import annotations

import fnmatch
import gzip
import lzma
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cmp_to_key
from pathlib import Path
from typing import NamedTuple

from .download import Progress, download, sha256
from .keys import signed_text, verify_key
from .lock import Artifact, ArtifactError

Paragraph = dict[str, str]
Take = Callable[..., Path]
OPERATORS = {"=": "eq", ">=": "ge", "<=": "le", ">>": "gt", "<<": "lt"}
DEPENDENCY = re.compile(r"([a-z0-9][a-z0-9.+-]+)(?::\w+)?\s*(?:\((<<|<=|=|>=|>>)\s*(\S+)\))?")


class Index(NamedTuple):
    """A file that the signed index names: its path and SHA-256."""

    path: str
    sha256: str


def paragraphs(text: str) -> Iterator[Paragraph]:
    """Yields the paragraphs of a Debian control file; continued lines are left out."""
    for block in text.split("\n\n"):
        fields = (line.split(":", 1) for line in block.splitlines() if ":" in line and not line.startswith((" ", "\t")))
        if found := {name: value.strip() for name, value in fields}:
            yield found


def indexes(release: str) -> list[Index]:
    """Returns the entries of the section SHA256 in a Release file."""
    section = release.split("\nSHA256:", 1)[-1]
    lines = re.match(r"(?:[^\n]*\n)((?: [^\n]*\n?)*)", section)
    rows = (line.split() for line in (lines[1] if lines else "").splitlines())
    return [Index(row[2], row[0]) for row in rows if len(row) == 3]


def compared(left: str, operator: str, right: str) -> bool:
    """Returns whether a comparison of two package versions is true."""
    return subprocess.run(["dpkg", "--compare-versions", left, operator, right], check=False).returncode == 0


def newest(candidates: list[Paragraph]) -> Paragraph:
    """Returns the paragraph with the newest version."""
    order = cmp_to_key(lambda a, b: 1 if compared(a["Version"], "gt", b["Version"]) else -1)
    return max(candidates, key=order)


def chosen(packages: list[Paragraph], wanted: dict[str, str], url: str) -> list[Paragraph]:
    """Returns the newest matching version of each wanted package, and their dependencies in the same list.

    Raises:
        ArtifactError: a wanted package is missing.
    """
    by_name: dict[str, list[Paragraph]] = {}
    for package in packages:
        by_name.setdefault(package["Package"], []).append(package)
    found: dict[str, Paragraph] = {}
    todo: list[tuple[str, str, str]] = []
    for name, pattern in wanted.items():
        matching = [p for p in by_name.get(name, []) if fnmatch.fnmatchcase(p["Version"], pattern)]
        if not matching:
            raise ArtifactError(f"{url} has no package {name} with the version {pattern}")
        found[name] = newest(matching)
        todo += dependencies(found[name])
    while todo:
        name, operator, version = todo.pop()
        fitting = [
            p for p in by_name.get(name, []) if not operator or compared(p["Version"], OPERATORS[operator], version)
        ]
        if fitting and name not in found:
            found[name] = newest(fitting)
            todo += dependencies(found[name])
    return list(found.values())


def dependencies(package: Paragraph) -> Iterator[tuple[str, str, str]]:
    """Yields name, operator and version of the first alternative of each dependency."""
    for group in f"{package.get('Pre-Depends', '')},{package.get('Depends', '')}".split(","):
        if match := DEPENDENCY.match(group.strip()):
            yield match[1], match[2] or "", match[3] or ""


def mirror_repository(artifact: Artifact, root: Path, source: str, progress: Progress) -> dict[str, str]:
    """Downloads the packages of an entry below `root`; returns the SHA-256 of each file by its path there.

    Raises:
        ArtifactError: it is not available, or a key, signature or checksum does not match.
    """
    base = root / artifact.path
    written: dict[str, str] = {}
    dists = "" if artifact.suite == "/" else f"dists/{artifact.suite}/"

    def take(path: str, expected: str | None = None, url: str = "", where: Path | None = None) -> Path:
        target = where or base / path
        digest = download(url or f"{source}/{path}", target, expected, progress)
        written[str(target.relative_to(root))] = digest
        return target

    key_url = artifact.key if "://" in artifact.key and source == artifact.url else ""
    key_target = root / artifact.key_path if artifact.key_path else base / artifact.key
    if artifact.key_path and not key_url:
        key_url = f"{source.removesuffix(artifact.path)}{artifact.key_path}"
    # Not moved into place before it is verified.
    draft = take("", url=key_url or f"{source}/{artifact.key}", where=key_target.with_name(key_target.name + ".new"))
    release = base / f"{dists}InRelease"
    try:
        verify_key(draft, artifact.fingerprints, key_url or f"{source}/{artifact.key}")
        new = take("", url=f"{source}/{dists}InRelease", where=release.with_name("InRelease.new"))
        text = signed_text(new, draft, f"{source}/{dists}InRelease")
        # The signed index comes last, so that an interrupted update keeps the index that matches the existing packages.
        lists = "".join(_list(take, dists, entry, text) for entry in indexes(text) if is_list(artifact, entry.path))
        for package in chosen(list(paragraphs(lists)), artifact.packages, source):
            place = package["Filename"].removeprefix("./")
            if Path(place).is_absolute() or ".." in Path(place).parts:
                raise ArtifactError(f"{source}: the package {package['Package']} is outside the repository ({place})")
            target = base / place
            if target.exists() and sha256(target) == package["SHA256"]:
                written[str(target.relative_to(root))] = package["SHA256"]
            else:
                take(place, package["SHA256"])
        for temporary, final in ((draft, key_target), (new, release)):
            digest = written.pop(str(temporary.relative_to(root)))
            os.replace(temporary, final)
            written[str(final.relative_to(root))] = digest
    finally:
        draft.unlink(missing_ok=True)
        release.with_name("InRelease.new").unlink(missing_ok=True)
    return written


def is_list(artifact: Artifact, path: str) -> bool:
    """Returns whether a file of the index is the package list, in the compression that the repository publishes."""
    folder = "" if artifact.suite == "/" else f"{artifact.component}/binary-{artifact.architecture}/"
    return path.removeprefix("./") in (f"{folder}Packages.gz", f"{folder}Packages.xz")


def _list(take: Take, dists: str, entry: Index, release: str) -> str:
    """Downloads a package list under both names that apt may request; returns its text."""
    path = f"{dists}{entry.path.removeprefix('./')}"
    file = take(path, entry.sha256)
    if "\nAcquire-By-Hash: yes" in release:
        by_hash = f"{Path(path).parent}/by-hash/SHA256/{entry.sha256}"
        take(by_hash, entry.sha256)
    packed = file.read_bytes()
    return (gzip.decompress(packed) if path.endswith(".gz") else lzma.decompress(packed)).decode() + "\n\n"
