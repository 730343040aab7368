"""Images of containers by their digests, through skopeo."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from .download import Progress, download, reachable, sha256
from .lock import Artifact, ArtifactError


def mirror_image(artifact: Artifact, root: Path) -> dict[str, str]:
    """Copies an image with all its platforms into an OCI archive; returns the archive's SHA-256 by its path.

    skopeo compares what it receives with the digest, down to each layer.

    Raises:
        ArtifactError: it cannot be had, or the lock has no digest of it.
    """
    if not artifact.sha256:
        raise ArtifactError(f"{artifact.url}:{artifact.version} has no digest in the lock: {artifact.unverified}")
    if problem := reachable(f"https://{artifact.host}/v2/"):
        raise ArtifactError(f"{artifact.url}: {artifact.host} is not reachable: {problem}")
    if not shutil.which("skopeo"):
        raise ArtifactError(f"{artifact.url}: skopeo is not installed, which copies images: install the package skopeo")
    target = root / artifact.path
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.unlink(missing_ok=True)
    reference = f"docker://{artifact.url}@sha256:{artifact.sha256}"
    command = [
        "skopeo",
        "copy",
        "--quiet",
        "--all",
        "--preserve-digests",
        reference,
        f"oci-archive:{part}:{artifact.version}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        part.unlink(missing_ok=True)
        raise ArtifactError(f"{reference.removeprefix('docker://')}: {done.stderr.strip().splitlines()[-1]}")
    os.replace(part, target)
    return {artifact.path: sha256(target)}


def copy_archive(artifact: Artifact, root: Path, url: str, progress: Progress) -> dict[str, str]:
    """Takes an image's archive from another mirror; returns its SHA-256 by its path.

    Raises:
        ArtifactError: it cannot be had, or is the archive of another image than that of the lock.
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
