"""The mirror: a folder with a manifest, published by a web server or packed as a bundle."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import images, repository, wheels
from .download import Progress, download, sha256
from .lock import Artifact, ArtifactError

MANIFEST = "manifest.json"
Report = Callable[[str], None]


def _entries(text: str | bytes) -> dict[str, dict[str, Any]]:
    """Returns the entries of a manifest. Raises ValueError that names the first one of another form."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("expected an object with an entry per artifact")
    for name, entry in content.items():
        known = entry if isinstance(entry, dict) else {}
        files = known.get("files")
        if not isinstance(known.get("version"), str):
            raise ValueError(f"{name}: expected a text in version")
        if not isinstance(files, dict) or not all(isinstance(each, str) for each in files.values()):
            raise ValueError(f"{name}: expected the SHA-256 of each path in files")
    return content


class Mirror:
    """A folder of artifacts.

    The manifest has, for each downloaded entry of the lock: its version, and the SHA-256 of its files by path.
    """

    def __init__(self, root: Path, project: Path) -> None:
        """Opens the folder `root`; lock files of wheels are in the folder `project`."""
        self.root, self.project = root, project
        self._lock = threading.Lock()
        file = root / MANIFEST
        try:
            self.manifest = _entries(file.read_text()) if file.exists() else {}
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{file} cannot be read: {error}: delete it, and fetch the artifacts again") from None

    def cached(self, artifact: Artifact) -> bool:
        """Returns whether the files of an entry exist, in the lock's version."""
        entry = self.manifest.get(artifact.name, {})
        if entry.get("version") != artifact.version or not all((self.root / path).exists() for path in entry["files"]):
            return False
        return artifact.kind != "wheels" or not wheels.missing(self.project / artifact.version, entry["files"].values())

    def problem(self, artifact: Artifact) -> str:
        """Returns the error in the files of a cached entry; empty if there is none."""
        files: dict[str, str] = self.manifest[artifact.name]["files"]
        for path, expected in files.items():
            if (found := sha256(self.root / path)) != expected:
                return f"{path} has the SHA-256 {found}, expected {expected}"
        if artifact.kind == "file" and artifact.sha256 and files.get(artifact.path) != artifact.sha256:
            return f"{artifact.path} does not match the lock"
        return ""

    def verify(self, artifact: Artifact) -> None:
        """Validates that an entry is in the mirror and unchanged since the download.

        Raises:
            ArtifactError: it is not.
        """
        if not self.cached(artifact):
            raise ArtifactError(
                f"{artifact.name} {artifact.version} is not in {self.root}: fetch it first, or choose other entries"
            )
        if problem := self.problem(artifact):
            raise ArtifactError(f"{artifact.name}: {problem}: fetch it again")

    def fetch(self, artifact: Artifact, source: str, progress: Progress) -> bool:
        """Makes sure that the files of an entry are in the mirror; returns whether something was downloaded.

        Args:
            artifact: the entry.
            source: URL of another mirror to download from; empty: the publisher.
            progress: called with the received and total bytes (0 if unknown).

        Raises:
            ArtifactError: they are not available, or do not match the lock.
        """
        if self.cached(artifact) and not self.problem(artifact):
            return False
        address = artifact.source(source)
        if artifact.kind == "file":
            known = self.manifest.get(artifact.name, {})
            recorded = known["files"].get(artifact.path) if known.get("version") == artifact.version else None
            files = {artifact.path: download(address, self.root / artifact.path, artifact.sha256 or recorded, progress)}
        elif artifact.kind == "apt":
            files = repository.mirror_repository(artifact, self.root, address, progress)
        elif artifact.kind == "wheels":
            files = wheels.mirror_wheels(artifact, self.project, self.root, address)
        elif source:
            files = images.copy_archive(artifact, self.root, address, progress)
        else:
            files = images.mirror_image(artifact, self.root)
        self._record(artifact, files)
        return True

    def _record(self, artifact: Artifact, files: dict[str, str]) -> None:
        """Records a downloaded entry in the manifest."""
        with self._lock:
            self.manifest[artifact.name] = {"version": artifact.version, "files": files}
            self._write()

    def _write(self) -> None:
        draft = self.root / f".{MANIFEST}"
        draft.write_text(json.dumps(self.manifest, indent=1, sort_keys=True) + "\n")
        os.replace(draft, self.root / MANIFEST)

    def fetch_all(
        self, artifacts: Iterable[Artifact], source: str, report: Report, progress: Callable[[str, int, int], None]
    ) -> int:
        """Fetches several entries, four at a time, and reports each; returns the number of failures."""
        self.root.mkdir(parents=True, exist_ok=True)

        def one(artifact: Artifact) -> int:
            try:
                fresh = self.fetch(artifact, source, lambda have, total: progress(artifact.name, have, total))
            except ArtifactError as error:
                report(f"FAILED {artifact.name}: {error}")
                return 1
            report(f"{'downloaded' if fresh else 'there'} {artifact.name} {artifact.version}")
            return 0

        with ThreadPoolExecutor(4) as pool:
            return sum(pool.map(one, artifacts))

    def export(self, artifacts: list[Artifact], bundle: Path) -> int:
        """Packs verified entries into a tar file that starts with the manifest; returns the number of files.

        Raises:
            ArtifactError: an entry is missing or was changed, or the bundle cannot be written.
        """
        for each in artifacts:
            self.verify(each)
        files = sorted({path for each in artifacts for path in self.manifest[each.name]["files"]})
        chosen = {each.name: self.manifest[each.name] for each in artifacts}
        part = bundle.with_name(bundle.name + ".part")
        manifest = self.root / ".bundle.json"
        try:
            manifest.write_text(json.dumps(chosen, indent=1, sort_keys=True) + "\n")
            with tarfile.open(part, "w") as archive:
                archive.add(manifest, MANIFEST)
                for path in files:
                    archive.add(self.root / path, path)
            os.replace(part, bundle)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise ArtifactError(f"{bundle}: {error.strerror}; the incomplete bundle was deleted") from None
        finally:
            manifest.unlink(missing_ok=True)
        return len(files)

    def unpack(self, bundle: Path) -> list[str]:
        """Imports a bundle if its files match its manifest; returns the names of its entries.

        Raises:
            ArtifactError: the bundle is incomplete or damaged; nothing was imported.
        """
        draft = self.root / ".bundle"
        taken: list[Path] = []
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tarfile.open(bundle) as archive:
                first = archive.next()
                content = archive.extractfile(first) if first and first.name == MANIFEST else None
                if content is None:
                    raise ArtifactError(f"{bundle} is not a bundle of artifacts: it does not start with {MANIFEST}")
                arrived = _entries(content.read())
                expected = {path: digest for entry in arrived.values() for path, digest in entry["files"].items()}
                for member in archive.getmembers()[1:]:
                    path = Path(member.name)
                    if not member.isreg() or member.name not in expected or path.is_absolute() or ".." in path.parts:
                        raise ArtifactError(f"{bundle} contains {member.name}, which its manifest does not list")
                    archive.extract(member, draft, filter="data")
                    if sha256(draft / member.name) != expected.pop(member.name):
                        raise ArtifactError(f"{bundle}: {member.name} differs from its manifest; nothing was imported")
                    taken.append(Path(member.name))
            if expected:
                raise ArtifactError(f"{bundle} lacks {min(expected)}, which its manifest lists; nothing was imported")
            for path in taken:
                (self.root / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(draft / path, self.root / path)
            self.manifest |= arrived
            self._write()
            return sorted(arrived)
        except (OSError, tarfile.TarError, ValueError) as error:
            raise ArtifactError(f"{bundle}: {error}; nothing was imported") from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)
