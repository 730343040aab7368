"""Images for NVIDIA GPUs, built on the lab's Debian base; imports and compiled kernels are checked without a GPU."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from lab import STATE, Lab
from test_lifecycle import played

pytestmark = [pytest.mark.lab, pytest.mark.full]

NEEDED = {"training": 25e9, "serving": 35e9}
"""Bytes for wheels, layers, the image and its copy in the registry, by image."""
# Triton compiles its launchers with a C compiler at run time.
PACKAGES = ["gcc", "libc6-dev", "libnuma1", "python3", "python3-dev", "python3-venv"]
TARGET = 80
IMPORTS = {
    "training": "import torch, triton, ictx.train.run",
    "serving": """
import torch, triton
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.attention.backends.registry import AttentionBackendEnum
assert AttentionBackendEnum.FLASH_ATTN_MLA.get_path().startswith("ictx."), "the plug-in is not registered"
""",
}


@pytest.mark.parametrize("name", list(IMPORTS))
def test_an_image_has_its_libraries_and_all_kernels_of_a_target(lab: Lab, name: str, tmp_path: Path) -> None:
    free = shutil.disk_usage(STATE).free
    if free < NEEDED[name]:
        pytest.skip(f"needs {NEEDED[name] / 1e9:.0f} GB of free disk space: {free / 1e9:.0f} GB are free")
    described = tmp_path / "image.json"
    settings = {
        "image_bake_accelerator": "cuda",
        "image_bake_base": {"release": "bookworm", "packages": PACKAGES},
        "image_bake_description_file": str(described),
        "image_bake_for_slurm": False,
        "image_bake_kernel_targets": [TARGET],
        "image_bake_tags": ["cuda"],
    }
    played("playbooks/images.yml", "--tags", name, "-e", json.dumps(settings))
    image = json.loads(described.read_text())["ref"]

    def inside(command: str) -> str:
        run = f"docker run --rm --network=none --user=0 {image} bash -c {shlex.quote(command)}"
        done = lab.run("svc1", run)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    try:
        check = f"{IMPORTS[name]}\nprint(torch.__version__, torch.version.cuda, triton.__version__)"
        version, cuda, triton = inside(f"ICTX_VLLM_ATTENTION=ictx python -c {shlex.quote(check)}").split()[-3:]
        assert cuda != "None", f"torch {version} is built for CPUs"
        kernels = "find /opt/ictx/kernels -type f -printf '%P %T@\\n' | sort"
        build = f"ictx kernels build --cache /opt/ictx/kernels --target {TARGET} >&2"
        before, after = inside(f"{kernels}; echo --; {build}; {kernels}").split("--\n")
        assert before == after, "a kernel that the image should contain was compiled"
        assert before
        size = int(lab.run("svc1", f"docker image inspect --format='{{{{.Size}}}}' {image}").stdout)
        print(f"{name}: {size / 1e9:.1f} GB, torch {version}, CUDA {cuda}, triton {triton}")
    finally:
        # The image has several names, and its layers are in the build cache too.
        every = f"docker image rm --force $(docker image inspect --format='{{{{.Id}}}}' {image})"
        lab.run("svc1", f"{every}; docker builder prune --force")
