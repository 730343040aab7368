"""Container images by digest, through skopeo."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .download import Progress, download, reachable, sha256
from .lock import Artifact, ArtifactError


@dataclass(frozen=True)
class Registry:
    """Target of pushes: HOST:PORT, its CA certificate, user and password."""

    address: str
    ca_file: Path | None = None
    user: str = ""
    password_file: Path | None = None

    def options(self, folder: Path) -> list[str]:
        """Returns skopeo's options for it; writes the files that they name into the folder."""
        found = []
        if self.ca_file:
            shutil.copy(self.ca_file, folder / "ca.crt")
            found.append(f"--cert-dir={folder}")
        if self.user:
            password = self.password_file.read_text().strip() if self.password_file else ""
            login = base64.b64encode(f"{self.user}:{password}".encode()).decode()
            (folder / "auth.json").write_text(json.dumps({"auths": {self.address: {"auth": login}}}))
            found.append(f"--authfile={folder}/auth.json")
        return found


def skopeo(artifact: Artifact, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs skopeo.

    Raises:
        ArtifactError: it is not installed.
    """
    if not shutil.which("skopeo"):
        raise ArtifactError(f"{artifact.url}: skopeo is required to copy images: install the package skopeo")
    return subprocess.run(["skopeo", *words], capture_output=True, text=True, check=False)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """Returns skopeo's error without the time and level of its log."""
    line = done.stderr.strip().splitlines()[-1]
    return line.partition(' msg="')[2].removesuffix('"') or line


def push_image(artifact: Artifact, root: Path, registry: Registry) -> bool:
    """Copies a mirrored image into a registry, at its publisher's path; returns whether it was pushed.

    Raises:
        ArtifactError: it cannot be pushed.
    """
    target = f"docker://{registry.address}/{artifact.url.partition('/')[2]}"
    with tempfile.TemporaryDirectory() as folder:
        options = registry.options(Path(folder))
        there = skopeo(artifact, "inspect", "--raw", *options, f"{target}@sha256:{artifact.sha256}")
        if there.returncode == 0:
            return False
        source = f"oci-archive:{root / artifact.path}:{artifact.version}"
        options = [option.replace("--", "--dest-", 1) for option in options]
        copy = ("copy", "--quiet", "--all", "--preserve-digests", *options)
        done = skopeo(artifact, *copy, source, f"{target}:{artifact.version}")
    if done.returncode != 0:
        raise ArtifactError(f"{target.removeprefix('docker://')} cannot be pushed: {complaint(done)}")
    return True


def mirror_image(artifact: Artifact, root: Path) -> dict[str, str]:
    """Copies an image with all its platforms into an OCI archive; returns the archive's SHA-256 by its path.

    skopeo compares what it receives with the digest, down to each layer.

    Raises:
        ArtifactError: it is not available, or the lock has no digest of it.
    """
    if not artifact.sha256:
        raise ArtifactError(f"{artifact.url}:{artifact.version} has no digest in the lock: {artifact.unverified}")
    if problem := reachable(f"https://{artifact.host}/v2/"):
        raise ArtifactError(f"{artifact.url}: {artifact.host} is not reachable: {problem}")
    target = root / artifact.path
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.unlink(missing_ok=True)
    reference = f"docker://{artifact.url}@sha256:{artifact.sha256}"
    copy = ("copy", "--quiet", "--all", "--preserve-digests")
    done = skopeo(artifact, *copy, reference, f"oci-archive:{part}:{artifact.version}")
    if done.returncode != 0:
        part.unlink(missing_ok=True)
        raise ArtifactError(f"{reference.removeprefix('docker://')}: {complaint(done)}")
    os.replace(part, target)
    return {artifact.path: sha256(target)}


def copy_archive(artifact: Artifact, root: Path, url: str, progress: Progress) -> dict[str, str]:
    """Downloads an image's archive from another mirror; returns its SHA-256 by path.

    Raises:
        ArtifactError: it is not available, or contains another image than the lock's.
    """
    target = root / artifact.path
    draft = target.with_name(target.name + ".new")
    found = download(url, draft, None, progress)
    try:
        with tarfile.open(draft) as archive:
            index = archive.extractfile("index.json")
            digests = [entry["digest"] for entry in json.load(index)["manifests"]] if index else []
            manifest = archive.extractfile(f"blobs/sha256/{artifact.sha256}")
            content = manifest.read() if manifest else b""
    except (KeyError, ValueError, tarfile.TarError) as error:
        raise ArtifactError(f"{url} is not the image {artifact.sha256}: {error}; it was not kept") from None
    else:
        if digests != [f"sha256:{artifact.sha256}"] or hashlib.sha256(content).hexdigest() != artifact.sha256:
            raise ArtifactError(f"{url} is the image {', '.join(digests)}, not {artifact.sha256}; it was not kept")
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return {artifact.path: found}
