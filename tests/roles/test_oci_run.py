"""A task's container gets its own rank, root and GPUs, and nothing that other users can change. The runtime and
scontrol are stubs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT
from hypothesis import given
from hypothesis import strategies as st

PROGRAMS = ROOT / "roles/slurm/files"
IMAGE = {"PATH": "/opt/ictx/venv/bin", "NVIDIA_VISIBLE_DEVICES": "all"}
STEP = {"PATH": "/usr/bin", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "HOME": "/home/researcher"}

sys.path.insert(0, str(PROGRAMS))
from oci_owner import trusted  # noqa: E402


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in the user's own space: pytest's is below a folder that another user could have created."""
    tmp_path.chmod(0o700)
    return tmp_path


def run(folder: Path, step: dict[str, str], local: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs ictx-oci-run on node n2, for the bundle that SLURM made from the image's, in the folder's `rootfs`."""
    image, bundle, rootfs = folder / "image", folder / "bundle", folder / "rootfs"
    for place in (image, bundle, rootfs):
        place.mkdir(exist_ok=True)
    scontrol, runtime = folder / "scontrol", folder / "runtime"
    scontrol.write_text("#!/bin/sh\nprintf 'n1\\nn2\\n'\n")
    runtime.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    for program in (scontrol, runtime):
        program.chmod(0o755)
    entries = {**STEP, **step, "SLURM_CONTAINER": str(image)}
    for place, variables in ((image, IMAGE), (bundle, entries)):
        env = [f"{name}={value}" for name, value in variables.items()]
        file = place / "config.json"
        if not file.exists():
            file.write_text(json.dumps({"process": {"env": env}, "root": {"path": "elsewhere"}}))
    return subprocess.run(
        [sys.executable, PROGRAMS / "ictx-oci-run", bundle, rootfs, runtime, "run", "n2.job"],
        env={"PATH": f"{folder}:{os.environ['PATH']}", "SLURMD_NODENAME": "n2", **local},
        capture_output=True,
        text=True,
        check=False,
    )


def started(
    folder: Path, step: dict[str, str], local: dict[str, str]
) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Returns the container's environment, its configuration, and the runtime's arguments."""
    done = run(folder, step, local)
    assert done.returncode == 0, done.stderr
    config = json.loads((folder / "bundle/config.json").read_text())
    return dict(entry.split("=", 1) for entry in config["process"]["env"]), config, done.stdout.split()


def test_a_task_gets_its_own_rank_and_root_and_the_images_variables(folder: Path) -> None:
    variables, config, arguments = started(folder, {}, {})
    assert config["root"]["path"] == str(folder / "rootfs")
    assert arguments == ["run", "n2.job", "--bundle", str(folder / "bundle")]
    assert (variables["SLURM_PROCID"], variables["SLURM_NODEID"], variables["HOSTNAME"]) == ("1", "1", "n2")
    assert variables["PATH"] == IMAGE["PATH"]
    assert variables["HOME"] == STEP["HOME"]


@pytest.mark.parametrize(
    ("step", "local", "visible"),
    [
        ({}, {}, "void"),
        ({"SLURM_JOB_GPUS": "0,1", "CUDA_VISIBLE_DEVICES": "0,1"}, {}, "0,1"),
        ({"SLURM_JOB_GPUS": "0,1"}, {"SLURM_STEP_GPUS": "2,3"}, "2,3"),
    ],
    ids=["none were requested", "the job's", "this node's"],
)
def test_a_task_sees_the_gpus_that_it_was_given(
    folder: Path, step: dict[str, str], local: dict[str, str], visible: str
) -> None:
    variables, _, _ = started(folder, step, local)
    assert variables["NVIDIA_VISIBLE_DEVICES"] == visible
    assert "CUDA_VISIBLE_DEVICES" not in variables


def test_the_variables_are_gone_when_the_container_has_started(folder: Path) -> None:
    _, config, _ = started(folder, {"TOKEN": "secret"}, {})
    file = folder / "bundle/config.json"
    assert file.stat().st_mode & 0o777 == 0o600
    for hook in config["hooks"]["createRuntime"]:
        subprocess.run([hook["path"], *hook["args"][1:]], check=True)
    assert file.read_text() == ""


def loosen(folder: Path, what: str) -> None:
    """Gives another user ownership of, or write access to, one part of the bundle or image."""
    match what:
        case "bundle of another":
            os.chown(folder / "image/config.json", 65534, -1)
        case "bundle's folder of another":
            os.chown(folder / "image", 65534, -1)
        case "bundle for a group":
            (folder / "image").chmod(0o775)
            os.chown(folder / "image", -1, 65534)
        case "bundle for all":
            (folder / "image/config.json").chmod(0o666)
        case "image of another":
            os.chown(folder / "rootfs", 65534, -1)
        case "image for all":
            (folder / "rootfs").chmod(0o777)
        case "folder above for all":
            folder.chmod(0o777)
        case "link to another's bundle":
            (folder / "image/config.json").rename(folder / "theirs.json")
            os.chown(folder / "theirs.json", 65534, -1)
            (folder / "image/config.json").symlink_to(folder / "theirs.json")


@pytest.mark.skipif(os.getuid() != 0, reason="requires root, to change owners")
@pytest.mark.attack(
    "C2",
    "a user starts a bundle or image that another user owns or can write to",
    before="its hooks ran as the user who started it",
    now="the container does not start",
)
@pytest.mark.parametrize(
    "what",
    [
        "bundle of another",
        "bundle's folder of another",
        "bundle for a group",
        "bundle for all",
        "image of another",
        "image for all",
        "folder above for all",
        "link to another's bundle",
    ],
)
def test_what_another_user_could_change_is_not_run(folder: Path, what: str) -> None:
    assert run(folder, {}, {}).returncode == 0
    (folder / "bundle/config.json").unlink()
    loosen(folder, what)
    done = run(folder, {}, {})
    assert done.returncode == 1
    assert "PermissionError" in done.stderr
    assert done.stdout == "", "the runtime must not start"


MODES = st.integers(min_value=0o700, max_value=0o777)


@given(above=MODES, sticky=st.booleans(), own=MODES)
def test_only_what_nobody_else_can_change_is_trusted(
    tmp_path_factory: pytest.TempPathFactory, above: int, sticky: bool, own: int
) -> None:
    top = tmp_path_factory.mktemp("trust")
    file = top / "above/file"
    file.parent.mkdir()
    file.write_text("")
    group = 65534 if os.getuid() == 0 else os.getgid()
    for path, mode in ((file, own), (file.parent, above | (0o1000 if sticky else 0))):
        os.chown(path, -1, group)
        path.chmod(mode)
    others = 0o002 if group in (0, os.getuid()) else 0o022
    safe = not own & others and (sticky or not above & others)
    if safe:
        assert trusted(file) == file.resolve()
    else:
        with pytest.raises(PermissionError):
            trusted(file)
