"""The inventory determines the kernels in an image, and an image is rebuilt when they change."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.template import Templar
from cluster import ROOT, Cluster, trusted
from hypothesis import given
from hypothesis import strategies as st
from programs import loaded

images_in_use = loaded(ROOT / "roles/image_bake/files/images-in-use")

BUILT_WITH_KERNELS = ("training", "serving")


def images(inventory: str, state: Path, **extra: Any) -> dict[str, dict[str, Any]]:
    """Returns the role's evaluated variables for each image of an inventory."""
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


def play(tasks: str, variables: dict[str, Any], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs some of the role's tasks on this machine; programs in the folder take precedence."""
    run = [{"ansible.builtin.include_role": {"name": "image_bake", "tasks_from": tasks}}]
    file = folder / "play.yml"
    start = {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": variables, "tasks": run}
    file.write_text(yaml.safe_dump([start]))
    return subprocess.run(
        ["ansible-playbook", "-i", "localhost,", str(file)],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )


SOURCES = [
    "deb http://mirror.example.org/debian bookworm main",
    "deb http://mirror.example.org/security bookworm-security main",
]


@pytest.mark.parametrize("sources", [[], SOURCES])
def test_a_root_comes_from_debian_or_from_the_sources_of_a_closed_network(sources: list[str], tmp_path: Path) -> None:
    """The role's command, with stand-ins for mmdebstrap and docker."""
    (block,) = (
        t
        for t in yaml.safe_load((ROOT / "roles/image_bake/tasks/base.yml").read_text())
        if t["name"] == "Build the Debian root"
    )
    (command,) = (t["ansible.builtin.shell"]["cmd"] for t in block["block"] if "ansible.builtin.shell" in t)
    cluster = Cluster(ROOT / "inventories/lab")
    role, play, hosts = next(use for use in cluster.uses("playbooks/images.yml") if use[0].get_name() == "image_bake")
    base = {"release": "bookworm", "packages": ["python3"]} | ({"sources": sources} if sources else {})
    variables = cluster.variables(hosts[0], play, role) | {"image_bake_base": base}
    script = Templar(cluster.loader, variables=variables).template(trusted(command))
    for name in ("mmdebstrap", "docker"):
        (tmp_path / name).write_text(f'#!/bin/sh\nfor word; do echo "$word" >>{tmp_path}/{name}.log; done\n')
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", script], env=environment, check=True)
    words = (tmp_path / "mmdebstrap.log").read_text().splitlines()
    assert words[words.index("bookworm") + 1 :] == ["-", *sources]


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
    done = play("preflight.yml", variables, tmp_path)
    assert ("images without CUDA contain no Triton" in done.stdout) == refused, done.stdout + done.stderr
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
    # The configs determine the kernels, so they are copied before the build.
    assert text.index("COPY configs /opt/ictx/configs") < text.index("kernels build")


@pytest.mark.parametrize("name", BUILT_WITH_KERNELS)
def test_an_image_holds_what_its_version_names(name: str, tmp_path: Path) -> None:
    """The commit, and the lock files where `ictx.version` reads them; the test runs the Dockerfile's line."""
    text = (ROOT / "images" / name / "Dockerfile").read_text()
    (line,) = re.findall(r"for lock in \$\{REQUIREMENTS\}; do install .*", text)
    locks = ROOT / "workload/requirements"
    script = line.replace("/requirements/", f"{locks}/").replace("/opt/ictx/venv", str(tmp_path))
    names = ["cpu.txt", "torch-cpu.txt"]
    for requirements, status in ((" ".join(names), 0), ("cpu.txt none.txt cpu.txt", 1)):
        done = subprocess.run(["sh", "-c", script], env={**os.environ, "REQUIREMENTS": requirements}, check=False)
        assert done.returncode == status
    (pattern,) = re.findall(r'^INSTALLED = "(.*)"$', (ROOT / "workload/src/ictx/version.py").read_text(), re.MULTILINE)
    assert {file.name: file.read_bytes() for file in tmp_path.glob(pattern)} == {
        pattern.replace("*.txt", lock): (locks / lock).read_bytes() for lock in names
    }
    last_stage = text[text.rindex("\nFROM ") :]
    assert last_stage.index("ARG REQUIREMENTS") < last_stage.index(line)
    assert last_stage.rindex("\nRUN ") < last_stage.index("ARG GIT_COMMIT") < last_stage.index("=${GIT_COMMIT}")


@pytest.mark.parametrize(("tag", "commit"), [("0123456789ab-dirty", "0123456789ab-dirty"), ("inputs-0123456789ab", "")])
def test_an_image_of_no_checkout_has_no_commit(tag: str, commit: str) -> None:
    cluster = Cluster(ROOT / "inventories/lab")
    role, play, hosts = next(use for use in cluster.uses("playbooks/images.yml") if use[0].get_name() == "image_bake")
    variables = cluster.variables(hosts[0], play, role) | {"_image_bake_tag": tag}
    assert Templar(cluster.loader, variables=variables).template(trusted("{{ _image_bake_commit }}")) == commit


def digest(number: int) -> str:
    """Returns the name of a layout."""
    return f"{number:064x}"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A shared directory with six layouts that are 60 to 66 days old; 0 is the oldest, and current."""
    layouts = tmp_path / "images/training"
    for number in range(6):
        folder = layouts / digest(number)
        folder.mkdir(parents=True)
        then = time.time() - (66 - number) * 24 * 3600
        os.utime(folder, (then, then))
    (layouts / "current").symlink_to(digest(0))
    return tmp_path


def bundle(shared: Path, path: str, number: int) -> None:
    """Creates a bundle of a layout."""
    file = shared / path / "config.json"
    file.parent.mkdir(parents=True)
    file.write_text(f'{{"root": {{"path": "{shared}/images/training/{digest(number)}/rootfs"}}}}')


@pytest.mark.attack(
    "M5",
    "an image older than a month is current after a rollback, or needed by a job that waits in the queue",
    before="the next image build removed it",
    now="current images, and those that a job's bundle uses, are kept at any age",
)
@pytest.mark.parametrize("answers", [True, False], ids=["controller answers", "controller is down"])
def test_the_current_image_and_those_of_jobs_are_not_removed(shared: Path, answers: bool) -> None:
    bundle(shared, "bundles/bob/17", 1)  # in the queue
    bundle(shared, "runs/bob/18/bundle", 2)  # in the queue, of an earlier release
    bundle(shared, "bundles/bob/16", 3)  # ended
    (shared / "squeue").write_text("#!/bin/sh\necho 17\necho 18\n" if answers else "#!/bin/sh\nexit 1\n")
    (shared / "squeue").chmod(0o755)
    variables = {
        "image_bake_shared_dir": str(shared),
        "image_bake_keep": 1,
        "ansible_python_interpreter": sys.executable,
    }
    done = play("collect.yml", variables, shared)
    assert done.returncode == 0, done.stdout
    left = {path.name for path in (shared / "images/training").iterdir()} - {"current"}
    # 5 is the newest.
    assert left == {digest(number) for number in ((0, 1, 2, 5) if answers else range(6))}


def test_images_are_found_in_bundles_only(shared: Path) -> None:
    for number, name in enumerate(("17", "18", "ictx-a1b2")):
        bundle(shared, f"bundles/bob/{name}", number)
    (shared / "bundles/eve").symlink_to(shared / "bundles/bob")
    os.mkfifo(shared / "bundles/bob/config.json")
    (shared / "bundles/bob/19").mkdir()
    os.mkfifo(shared / "bundles/bob/19/config.json")
    (shared / "bundles/bob/20").mkdir()
    (shared / "bundles/bob/20/config.json").symlink_to(shared / "bundles/bob/18/config.json")
    assert images_in_use.in_use(shared, {"17", "19", "20"}) == {digest(0), digest(2)}


@given(content=st.binary(max_size=200), number=st.integers(0, 2**256 - 1), after=st.binary(max_size=20))
def test_digests_are_found_in_whatever_a_user_writes(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, number: int, after: bytes
) -> None:
    file = tmp_path_factory.mktemp("bundle") / "config.json"
    file.write_bytes(content + b"/" + digest(number).encode() + b"/" + after)
    assert digest(number) in images_in_use.digests(file)


def test_a_layout_has_no_program_with_rights_of_its_own(tmp_path: Path) -> None:
    text = (ROOT / "roles/image_bake/tasks/layout.yml").read_text()
    (command,) = re.findall(r"^ +(find .*)$", text, re.MULTILINE)
    root = tmp_path / "rootfs"
    for name, mode in {"su": 0o4755, "wall": 0o2755, "tmp": 0o1777, "plain": 0o644}.items():
        (root / name).mkdir(parents=True)
        (root / name).chmod(mode)
    (root / "link").symlink_to("/etc/passwd")
    subprocess.run(["bash", "-c", command], env={**os.environ, "draft": str(tmp_path)}, check=True)
    modes = {name: (root / name).stat().st_mode & 0o7777 for name in ("su", "wall", "tmp", "plain")}
    assert modes == {"su": 0o755, "wall": 0o755, "tmp": 0o1755, "plain": 0o644}
    assert Path("/etc/passwd").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("registry", ["[fd00:10::15]:5000", "192.0.2.15:5000"])
def test_the_reference_is_that_of_the_registry(registry: str) -> None:
    (task,) = (
        task
        for task in yaml.safe_load((ROOT / "roles/image_bake/tasks/layout.yml").read_text())
        if task["name"] == "Describe the image"
    )
    wanted = f"{registry}/ictx/training@sha256:1"
    variables = {
        "image_bake_registry": registry,
        "_image_bake_inspected": {"RepoDigests": ["192.0.2.15:50001/ictx/training@sha256:1", wanted]},
    }
    templar = Templar(Cluster(ROOT / "inventories/lab").loader, variables=variables)
    assert templar.template(trusted(task["vars"]["_image_bake_reference"])) == wanted
