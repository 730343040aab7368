"""Wheels of a pip lock file, which has the SHA-256 of each."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from .download import sha256
from .lock import Artifact, ArtifactError

REQUIREMENT = re.compile(
    r"^([A-Za-z0-9][A-Za-z0-9._-]*)==\S+(?:\s*;[^\n\\]*)?((?:\s*\\\n\s+--hash=sha256:[0-9a-f]{64})+)", re.MULTILINE
)
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
HASH = re.compile(r"sha256:([0-9a-f]{64})")
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def platforms(architecture: str) -> list[str]:
    """Returns the platform tags of wheels, as in roles/image_bake; a test compares both."""
    machine = MACHINES[architecture]
    older = ["manylinux2010_x86_64", "manylinux1_x86_64"] if machine == "x86_64" else []
    return [*(f"manylinux_2_{minor}_{machine}" for minor in range(35, 4, -1)), f"manylinux2014_{machine}", *older]


def index_problem() -> str:
    """Returns why pip's configured index is not available; empty if it is."""
    command = [*PIP, "--retries", "0", "--timeout", "5", "index", "versions", "pip"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else "pip's index does not respond"


def missing(lock: Path, digests: Iterable[str]) -> list[str]:
    """Returns the packages of a lock file without any file among the SHA-256 `digests`."""
    here = set(digests)
    return [name for name, hashes in REQUIREMENT.findall(lock.read_text()) if not here & set(HASH.findall(hashes))]


def mirror_wheels(artifact: Artifact, project: Path, root: Path, source: str) -> dict[str, str]:
    """Downloads the wheels of a lock file, for the Python and the platform of images; returns their SHA-256 by path.

    pip verifies each with the lock. Its configuration (index, proxy, find-links) applies, as in image builds.

    Raises:
        ArtifactError: pip could not download them.
    """
    folder, lock = root / artifact.path, project / artifact.version
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *PIP, "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:", "--implementation=cp",
        f"--python-version={artifact.python}", f"--dest={folder}", f"--find-links={folder}",
        *(f"--platform={name}" for name in platforms(artifact.architecture)),
    ]  # fmt: skip
    if source != artifact.url:
        command += ["--no-index", f"--find-links={source}/", f"--trusted-host={urlsplit(source).hostname}"]
    elif source:
        command += [f"--extra-index-url={source}"]
    done = subprocess.run([*command, f"--requirement={lock}"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = (
            [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            or done.stderr.splitlines()
            or ["pip failed"]
        )
        raise ArtifactError(f"{artifact.version} from {source}: {errors[0].removeprefix('ERROR: ')}")
    hashes = set(HASH.findall(lock.read_text()))
    return {str(file.relative_to(root)): digest for file in folder.glob("*.whl") if (digest := sha256(file)) in hashes}
