"""Version information: release, commit, image, lock files and the main dependencies."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

from ictx import __version__

BELOW = ("torch", "triton", "transformers", "vllm")
INSTALLED = ".installed-*.txt"
"""Copies of an environment's lock files in its folder, written by the images and scripts/bootstrap."""


def installed(package: str) -> str:
    """Returns an installed package's version; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Returns the commit of the image, or of the checkout (with `-dirty` if it has changes); empty if unknown."""
    if found := os.environ.get("ICTX_GIT_COMMIT"):
        return found
    # Only for workload/src/ictx of a checkout: an installed package may be inside an unrelated repository.
    root = Path(__file__).resolve().parents[3]
    if not (root / "workload/pyproject.toml").is_file():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def locks() -> dict[str, str]:
    """Returns the first 12 digits of the SHA-256 of each lock file of this environment, by name."""
    found = sorted(Path(sys.prefix).glob(INSTALLED))
    return {file.name.removeprefix(".installed-"): hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in found}


def describe() -> str:
    """Returns the output of `ictx --version`."""
    of = commit()
    lines = [f"ictx {__version__}" + (f" (commit {of})" if of else "")]
    if image := os.environ.get("ICTX_IMAGE_DIGEST"):
        lines.append(f"image {image}")
    if hashes := locks():
        lines.append("locks " + ", ".join(f"{name} {short}" for name, short in hashes.items()))
    versions = {"Python": platform.python_version()} | {name: installed(name) for name in BELOW}
    lines.append(", ".join(f"{name} {version}" for name, version in versions.items() if version))
    return "\n".join(lines)
