"""The lab's requirements: containers are running only if their process exists, and caches count as disk space.

Process folders are laid out as in procfs."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace

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


def procfs(folder: Path, source: str, point: str) -> Path:
    """Lays out a procfs whose process 4711 has a root and one more mount."""
    (folder / "4711").mkdir(parents=True)
    root, more = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw", f"49 27 0:23 {source} {point} rw - tmpfs tmpfs rw"
    (folder / "4711/mountinfo").write_text(f"{root}\n{more}\n")
    return folder


def contained(folder: Path, container: str) -> Path:
    """Lays out a procfs whose process 4711 is the first of a container."""
    return procfs(folder, f"/containers/storage/overlay-containers/{container}/userdata/hostname", "/etc/hostname")


def test_a_container_whose_process_lives_runs(module: ModuleType, tmp_path: Path) -> None:
    """Podman's state is correct if the process belongs to the container."""
    assert module.state(CONTAINER, contained(tmp_path, CONTAINER["Id"])) == "running"


def test_a_container_without_its_process_is_dead(module: ModuleType, tmp_path: Path) -> None:
    """After a power loss, podman's record still has the state running."""
    assert module.state(CONTAINER, tmp_path) == "dead"


def test_a_process_id_that_another_has_by_now_is_not_the_container(module: ModuleType, tmp_path: Path) -> None:
    """Process IDs are reused, also by the nodes of the next lab."""
    assert module.state(CONTAINER, contained(tmp_path, "f1c5de176718a695")) == "dead"


def test_a_process_of_this_machine_with_the_id_is_not_the_container(module: ModuleType, tmp_path: Path) -> None:
    """A container's mounts remain on this machine after it ended, and are visible to every process."""
    shared_memory = f"/var/lib/containers/storage/overlay-containers/{CONTAINER['Id']}/userdata/shm"
    assert module.state(CONTAINER, procfs(tmp_path, "/", shared_memory)) == "dead"


def test_a_container_that_ended_is_what_podman_says(module: ModuleType, tmp_path: Path) -> None:
    """The process of an ended container is not checked."""
    assert module.state(CONTAINER | {"State": "exited"}, contained(tmp_path, CONTAINER["Id"])) == "exited"


def disk(folder: Path, **wishes: int) -> dict[str, object]:
    """Returns the module's parameters for a machine whose only file system is that of the folder."""
    return {"paths": [str(folder)], "own_paths": [str(folder / "cache"), str(folder / "absent")], **wishes}


def test_what_the_caches_hold_is_not_asked_for_again(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run needs disk only for what the first did not download; else a machine could run the lab only once."""
    # 1 kB stands for 1 GB, and the disk has 19.5 kB.
    monkeypatch.setattr(module, "GB", 1e3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=19_500))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/layer").write_bytes(bytes(10**6))
    wish = disk(tmp_path, min_disk_gb=1019, min_free_gb=4)
    assert module.disk_problems(wish) == []
    (tmp_path / "cache/layer").unlink()
    (problem,) = module.disk_problems(wish)
    assert f"free disk at {tmp_path} is 19.5 GB" in problem


def test_even_warm_caches_need_some_free_disk(module: ModuleType, tmp_path: Path) -> None:
    """A full disk is reported before anything runs, regardless of the caches."""
    problems = module.disk_problems(disk(tmp_path, min_disk_gb=0, min_free_gb=10**12))
    assert len(problems) == 1
    assert str(tmp_path) in problems[0]


def test_a_bridge_that_a_lab_left_is_named_with_its_remedy(module: ModuleType, tmp_path: Path) -> None:
    """After a power loss podman has no record of the network, but its bridge keeps the address."""
    for device in ("podman3", "podman4"):
        (tmp_path / device / "brif").mkdir(parents=True)
    (tmp_path / "podman4/brif/veth0").mkdir()
    (tmp_path / "eth0").mkdir()
    assert "ip link delete podman3" in module.free("podman3", tmp_path)
    for device in ("podman4", "eth0"):
        assert module.free(device, tmp_path) == "set lab_subnet to a free /24"
