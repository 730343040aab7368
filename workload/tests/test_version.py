"""`ictx --version` prints the commit, the image and the lock files."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from ictx import __version__

LOCKS = {"cpu.txt": b"torch==1\n", "torch-cpu.txt": b"torch==2\n"}


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment that was installed from two lock files."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    for name, content in LOCKS.items():
        (folder / f".installed-{name}").write_bytes(content)
    (folder / ".installed-pyproject.toml").write_text("no lock")
    return folder


def printed(source: Path, python: Path = Path(sys.executable), **environment: str) -> list[str]:
    """Returns the output lines of the program in a folder of sources."""
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join([str(source), *sys.path]), **environment}
    command = [python, "-m", "ictx", "--version"]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.splitlines()


def checkout(folder: Path) -> Path:
    """Creates a repository with this package; returns its folder of sources."""
    workload, here = folder / "workload", Path(__file__).parents[1]
    workload.mkdir(parents=True)
    (workload / "pyproject.toml").write_bytes((here / "pyproject.toml").read_bytes())
    # Compiled files would be written again, which is a change.
    shutil.copytree(here / "src", workload / "src", ignore=shutil.ignore_patterns("__pycache__"))
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "--message=a"]):
        subprocess.run(["git", "-C", folder, *words], check=True)
    return workload / "src"


def test_a_checkout_is_named_by_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    source = checkout(tmp_path / "repository")
    head = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    first, *_, packages = printed(source)
    commit = first.removeprefix(f"ictx {__version__} (commit ").removesuffix(")")
    assert len(commit) >= 7
    assert head.startswith(commit)
    assert f"torch {version('torch')}" in packages
    (source / "ictx/__init__.py").write_text((source / "ictx/__init__.py").read_text() + "# changed\n")
    assert printed(source)[0] == f"ictx {__version__} (commit {commit}-dirty)"


def test_a_job_names_its_image(tmp_path: Path) -> None:
    """The commit of a repository that contains the installed package is not the package's commit."""
    source = checkout(tmp_path / "repository")
    (source.parent / "pyproject.toml").unlink()
    assert printed(source)[0] == f"ictx {__version__}"
    lines = printed(source, ICTX_GIT_COMMIT="0123abc", ICTX_IMAGE_DIGEST="sha256:12")
    assert lines[:2] == [f"ictx {__version__} (commit 0123abc)", "image sha256:12"]


def test_an_installed_wheel_names_the_lock_files_of_its_environment_and_no_commit(
    tmp_path: Path, environment: Path
) -> None:
    copy = shutil.copytree(Path(__file__).parents[1] / "src", tmp_path / "workload/src").parent
    shutil.copy(Path(__file__).parents[1] / "pyproject.toml", copy)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", tmp_path, copy], check=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    (wheel,) = tmp_path.glob("ictx-*.whl")
    shutil.unpack_archive(wheel, packages, "zip")
    shutil.rmtree(copy)
    first, *rest, below = printed(packages, environment / "bin/python")
    assert first == f"ictx {__version__}"
    hashes = {name: hashlib.sha256(content).hexdigest()[:12] for name, content in LOCKS.items()}
    assert rest == ["locks " + ", ".join(f"{name} {digits}" for name, digits in hashes.items())]
    assert below.startswith("Python ")


def test_an_environment_of_unknown_origin_names_no_lock_file(tmp_path: Path, environment: Path) -> None:
    for name in LOCKS:
        (environment / f".installed-{name}").unlink()
    lines = printed(checkout(tmp_path / "repository"), environment / "bin/python")
    assert len(lines) == 2
    assert lines[0].startswith(f"ictx {__version__} (commit ")
