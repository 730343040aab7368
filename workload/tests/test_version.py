"""`ictx --version` names the commit and the image that run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from ictx import __version__


def printed(source: Path, **environment: str) -> list[str]:
    """Returns the lines that the program prints from a folder of sources."""
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join([str(source), *sys.path]), **environment}
    command = [sys.executable, "-m", "ictx", "--version"]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.splitlines()


def checkout(folder: Path) -> Path:
    """Makes a repository with this package; returns its folder of sources."""
    workload, here = folder / "workload", Path(__file__).parents[1]
    workload.mkdir(parents=True)
    (workload / "pyproject.toml").write_bytes((here / "pyproject.toml").read_bytes())
    # Compiled files are written anew, which would be a change.
    shutil.copytree(here / "src", workload / "src", ignore=shutil.ignore_patterns("__pycache__"))
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "--message=a"]):
        subprocess.run(["git", "-C", folder, *words], check=True)
    return workload / "src"


def test_a_checkout_is_named_by_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    source = checkout(tmp_path / "repository")
    head = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    first, packages = printed(source)
    commit = first.removeprefix(f"ictx {__version__} (commit ").removesuffix(")")
    assert len(commit) >= 7
    assert head.startswith(commit)
    assert f"torch {version('torch')}" in packages
    (source / "ictx/__init__.py").write_text((source / "ictx/__init__.py").read_text() + "# changed\n")
    assert printed(source)[0] == f"ictx {__version__} (commit {commit}-dirty)"


def test_a_job_names_its_image(tmp_path: Path) -> None:
    """What a repository around the installed package holds is not this package's commit."""
    source = checkout(tmp_path / "repository")
    (source.parent / "pyproject.toml").unlink()
    assert printed(source)[0] == f"ictx {__version__}"
    lines = printed(source, ICTX_GIT_COMMIT="0123abc", ICTX_IMAGE_DIGEST="sha256:12")
    assert lines[:2] == [f"ictx {__version__} (commit 0123abc)", "image sha256:12"]
