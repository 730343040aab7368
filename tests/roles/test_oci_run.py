"""What a task's container gets: its own rank, root and GPUs. The runtime and scontrol are stand-ins: no SLURM here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import ROOT

IMAGE = {"PATH": "/opt/ictx/venv/bin", "NVIDIA_VISIBLE_DEVICES": "all"}
STEP = {"PATH": "/usr/bin", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "HOME": "/home/researcher"}


def started(folder: Path, step: dict[str, str], local: dict[str, str]) -> tuple[dict[str, str], str, list[str]]:
    """Runs ictx-oci-run on node n2; returns the container's variables, its root, and the runtime's arguments."""
    image, bundle = folder / "image", folder / "bundle"
    for place in (image, bundle):
        place.mkdir()
    scontrol, runtime = folder / "scontrol", folder / "runtime"
    scontrol.write_text("#!/bin/sh\nprintf 'n1\\nn2\\n'\n")
    runtime.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    for program in (scontrol, runtime):
        program.chmod(0o755)
    entries = {**STEP, **step, "SLURM_CONTAINER": str(image)}
    for place, variables in ((image, IMAGE), (bundle, entries)):
        env = [f"{name}={value}" for name, value in variables.items()]
        (place / "config.json").write_text(json.dumps({"process": {"env": env}, "root": {"path": "elsewhere"}}))
    done = subprocess.run(
        [sys.executable, ROOT / "roles/slurm/files/ictx-oci-run", bundle, "/the/rootfs", runtime, "run", "n2.job"],
        env={"PATH": f"{folder}:{os.environ['PATH']}", "SLURMD_NODENAME": "n2", **local},
        capture_output=True,
        text=True,
        check=True,
    )
    config = json.loads((bundle / "config.json").read_text())
    return dict(entry.split("=", 1) for entry in config["process"]["env"]), config["root"]["path"], done.stdout.split()


def test_a_task_gets_its_own_rank_and_root_and_the_images_variables(tmp_path: Path) -> None:
    variables, root, arguments = started(tmp_path, {}, {})
    assert root == "/the/rootfs"
    assert arguments == ["run", "n2.job", "--bundle", str(tmp_path / "bundle")]
    assert (variables["SLURM_PROCID"], variables["SLURM_NODEID"], variables["HOSTNAME"]) == ("1", "1", "n2")
    assert variables["PATH"] == IMAGE["PATH"]
    assert variables["HOME"] == STEP["HOME"]
    assert (tmp_path / "bundle" / "config.json").stat().st_mode & 0o777 == 0o600, "variables may be secrets"


@pytest.mark.parametrize(
    ("step", "local", "visible"),
    [
        ({}, {}, "void"),
        ({"SLURM_JOB_GPUS": "0,1", "CUDA_VISIBLE_DEVICES": "0,1"}, {}, "0,1"),
        ({"SLURM_JOB_GPUS": "0,1"}, {"SLURM_STEP_GPUS": "2,3"}, "2,3"),
    ],
    ids=["none were asked for", "the job's", "this node's"],
)
def test_a_task_sees_the_gpus_that_it_was_given(
    tmp_path: Path, step: dict[str, str], local: dict[str, str], visible: str
) -> None:
    variables, _, _ = started(tmp_path, step, local)
    assert variables["NVIDIA_VISIBLE_DEVICES"] == visible
    assert "CUDA_VISIBLE_DEVICES" not in variables
