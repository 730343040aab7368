"""Whether a container of the lab lives is read from the kernel; process folders here are laid out as procfs does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from cluster import ROOT

CONTAINER = {"Id": "43888b31345d4cd2", "Pid": 4711, "State": "running"}


@pytest.fixture(scope="module")
def module() -> ModuleType:
    """Returns the Ansible module."""
    spec = importlib.util.spec_from_file_location("lab_host", ROOT / "roles/lab/library/lab_host.py")
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def procfs(folder: Path, container: str) -> Path:
    """Lays out a procfs whose process 4711 mounts the files of a container."""
    (folder / "4711").mkdir(parents=True)
    source = f"/containers/storage/overlay-containers/{container}/userdata/hostname"
    (folder / "4711/mountinfo").write_text(f"712 680 0:23 {source} /etc/hostname rw,nosuid - tmpfs tmpfs rw\n")
    return folder


def test_a_container_whose_process_lives_runs(module: ModuleType, tmp_path: Path) -> None:
    """Podman's word stands when the process is the container's own."""
    assert module.state(CONTAINER, procfs(tmp_path, CONTAINER["Id"])) == "running"


def test_a_container_without_its_process_is_dead(module: ModuleType, tmp_path: Path) -> None:
    """A machine that was cut off leaves a record that still says running."""
    assert module.state(CONTAINER, tmp_path) == "dead"


def test_a_process_id_that_another_has_by_now_is_not_the_container(module: ModuleType, tmp_path: Path) -> None:
    """Process ids are reused, also by the next lab's nodes."""
    assert module.state(CONTAINER, procfs(tmp_path, "f1c5de176718a695")) == "dead"


def test_a_container_that_ended_is_what_podman_says(module: ModuleType, tmp_path: Path) -> None:
    """The process of an ended container is not asked for."""
    assert module.state(CONTAINER | {"State": "exited"}, procfs(tmp_path, CONTAINER["Id"])) == "exited"
