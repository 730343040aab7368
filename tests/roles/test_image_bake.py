"""Which kernels an image holds follows the inventory, and an image is baked again when they change."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.template import Templar
from cluster import ROOT, Cluster, trusted

BUILT_WITH_KERNELS = ("training", "serving")


def images(inventory: str, state: Path, **extra: Any) -> dict[str, dict[str, Any]]:
    """Returns what the role makes of its variables for each image of an inventory."""
    cluster = Cluster(
        ROOT / "inventories" / inventory, {"ictx_state_dir": str(state), "lab_state_dir": str(state), **extra}
    )
    found = {}
    for role, play, hosts in cluster.uses("playbooks/images.yml"):
        if role.get_name() == "image_bake":
            variables = cluster.variables(hosts[0], play, role)
            templar = Templar(cluster.loader, variables=variables)
            wanted = ("image_bake_name", "_image_bake_kernel_targets", "_image_bake_settings")
            values = {name: templar.template(trusted(f"{{{{ {name} }}}}")) for name in wanted}
            found[values["image_bake_name"]] = values
    return found


def test_images_hold_kernels_for_the_gpus_of_the_inventory(tmp_path: Path) -> None:
    example = images("example", tmp_path)
    assert {name: image["_image_bake_kernel_targets"] for name, image in example.items()} == {
        "training": [80], "serving": [80], "mlflow": []
    }  # fmt: skip
    lab = images("lab", tmp_path)
    assert set(lab) == set(example)
    assert not any(image["_image_bake_kernel_targets"] for image in lab.values())


def test_other_gpus_make_another_image(tmp_path: Path) -> None:
    before, after = images("example", tmp_path), images("example", tmp_path, image_bake_kernel_targets=[80, 90])
    for name in before:
        changed = before[name]["_image_bake_settings"] != after[name]["_image_bake_settings"]
        assert changed == (name in BUILT_WITH_KERNELS), name


@pytest.mark.parametrize(("accelerator", "refused"), [("cpu", True), ("cuda", False)])
def test_images_without_cuda_hold_no_kernels(accelerator: str, refused: bool, tmp_path: Path) -> None:
    variables = {
        "image_bake_accelerator": accelerator,
        "image_bake_base": {"release": "bookworm"},
        "image_bake_kernel_targets": [80],
        "image_bake_registry": "192.0.2.1:5000",
        "image_bake_registry_ca": "/none",
        "image_bake_registry_password_file": str(tmp_path / "password"),
        "image_bake_source_dir": str(ROOT),
    }
    tasks = [{"ansible.builtin.include_role": {"name": "image_bake", "tasks_from": "preflight.yml"}}]
    file = tmp_path / "play.yml"
    start = {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": variables, "tasks": tasks}
    file.write_text(yaml.safe_dump([start]))
    done = subprocess.run(
        ["ansible-playbook", "-i", "localhost,", str(file)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ("images without CUDA hold no Triton" in done.stdout) == refused, done.stdout + done.stderr
    assert (done.returncode != 0) == refused


@pytest.mark.parametrize("name", BUILT_WITH_KERNELS)
def test_triton_reads_the_folder_that_the_build_fills(name: str) -> None:
    text = (ROOT / "images" / name / "Dockerfile").read_text()
    (folder,) = re.findall(r"kernels build --cache (\S+)", text)
    assert re.findall(r"\bICTX_KERNEL_CACHE=(\S+)", text) == [folder]
    (manager,) = re.findall(r"\bTRITON_CACHE_MANAGER=(\S+)", text)
    module, _, wanted = manager.partition(":")
    tree = ast.parse((ROOT / "workload/src" / f"{module.replace('.', '/')}.py").read_text())
    assert wanted in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    # Which kernels there are follows the configs: they come before the build.
    assert text.index("COPY configs /opt/ictx/configs") < text.index("kernels build")
