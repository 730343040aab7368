"""Container engines get NVIDIA's runtime; nvidia-ctk is a stub that writes and prints files as release 1.18 does."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from cluster import ROOT
from programs import play

ROLE = ROOT / "roles/nvidia_container_toolkit"
TASKS = (ROLE / "tasks/configure.yml").read_text()
VARS = (ROLE / "vars/main.yml").read_text()
# Of release 1.18's unit that regenerates the CDI specification.
CONDITION = re.compile(r"/(nvidia|nvidia-current)\.ko[:]")
# With --dry-run, the drop-in file and the main file of containerd are printed one after the other.
CTK = """#!/bin/sh
dropin='version = 2
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.nvidia.options]
BinaryName = "/usr/bin/nvidia-container-runtime"'
main='imports = ["/etc/containerd/conf.d/*.toml"]
version = 2
root = "/data/containerd"'
case $* in
  *docker*) echo '{"runtimes": {"nvidia": {"path": "nvidia-container-runtime"}}}' ;;
  *--dry-run*) echo "$dropin"; echo "$main" ;;
  *) mkdir -p ETC/containerd/conf.d; echo "$dropin" >ETC/containerd/conf.d/99-nvidia.toml
    echo "$main" >ETC/containerd/config.toml ;;
esac
"""


def configure(folder: Path, engines: list[str]) -> str:
    """Runs the tasks that configure the engines, with another folder instead of /etc; returns the output."""
    tasks, known = (yaml.safe_load(text.replace("/etc/", f"{folder}/etc/")) for text in (TASKS, VARS))
    names = [task["name"] for task in tasks]
    mine = tasks[names.index("Enable the regeneration of the CDI specification") + 1 : -1]
    stub = folder / "nvidia-ctk"
    stub.write_text(CTK.replace("ETC", str(folder / "etc")))
    stub.chmod(0o755)
    handlers = [{"name": f"Restart {e}", "debug": {"msg": f"{e} was restarted"}} for e in ("docker", "containerd")]
    given = known | {"nvidia_container_toolkit_runtimes": engines}
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = play(folder, mine, given, handlers=handlers, environment=path)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_containerd_keeps_its_configuration_and_imports_the_runtime(tmp_path: Path) -> None:
    main = tmp_path / "etc/containerd/config.toml"
    main.parent.mkdir(parents=True)
    main.write_text('version = 2\nroot = "/data/containerd"\n')
    assert "containerd was restarted" in configure(tmp_path, ["containerd"])
    assert tomllib.loads(main.read_text())["root"] == "/data/containerd"
    assert tomllib.loads((main.parent / "conf.d/99-nvidia.toml").read_text())["plugins"]
    again = configure(tmp_path, ["containerd"])
    assert "was restarted" not in again
    assert "changed=0" in again


def test_docker_is_restarted_once(tmp_path: Path) -> None:
    (tmp_path / "etc/docker").mkdir(parents=True)
    assert "docker was restarted" in configure(tmp_path, ["docker"])
    assert "nvidia" in json.loads((tmp_path / "etc/docker/daemon.json").read_text())["runtimes"]
    assert "changed=0" in configure(tmp_path, ["docker"])
    assert not (tmp_path / "etc/containerd").exists()


@pytest.mark.parametrize("module", ["nvidia.ko.zst", "nvidia.ko.xz", "nvidia-current-open.ko"])
def test_containers_see_the_gpus_after_a_reboot_whatever_the_module_s_file(module: str) -> None:
    assert not CONDITION.search(f"updates/dkms/{module}: kernel/drivers/x.ko")
    dropin = next(task for task in yaml.safe_load(TASKS) if task["name"].startswith("Adapt the unit"))
    lines = dropin["ansible.builtin.copy"]["content"].splitlines()
    # An empty value removes the unit's own condition.
    assert lines.index("ExecCondition=") < lines.index("ExecCondition=/usr/bin/nvidia-smi -L")
