"""playbooks/measure-nodes.yml writes the reachable nodes into the inventory; a second run changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster import ROOT

REPORT = (
    "NodeName=x CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=7951\nUpTime=0-01:00:00"
)


def measure(folder: Path, status: int = 4) -> str:
    """Runs the playbook; returns its output."""
    command = [
        "ansible-playbook",
        "-i",
        f"{folder}/hosts.yml",
        "playbooks/measure-nodes.yml",
        "-e",
        "ansible_become=false",
    ]
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    # 4: a host is unreachable.
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.mark.full
def test_nodes_that_answer_are_written_and_others_stay(tmp_path: Path) -> None:
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    hosts = {
        "n1": local,
        "n2": local,
        "gone": {"ansible_host": "127.0.0.1", "ansible_port": 1, "ansible_ssh_retries": 0},
    }
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"children": {"slurm_compute": {"hosts": hosts}}}}))
    (tmp_path / "slurmd").write_text(f"#!/bin/sh\ncat <<E\n{REPORT}\nE\n")
    (tmp_path / "slurmd").chmod(0o755)
    file = tmp_path / "group_vars/all/slurm_nodes.yml"
    file.parent.mkdir(parents=True)
    before = {"nodes": "gone", "cpus": 2, "memory_mb": 1000}
    file.write_text(yaml.safe_dump({"slurm_measured_nodes": [before]}))
    measure(tmp_path)
    text = file.read_text()
    assert yaml.safe_load(text)["slurm_measured_nodes"] == [
        before,
        {"nodes": "n[1-2]", "sockets": 1, "cores_per_socket": 4, "threads_per_core": 1, "memory_mb": 7951},
    ]
    assert "changed=0" in measure(tmp_path).replace("changed=0    unreachable=1", "")
    assert file.read_text() == text


@pytest.mark.full
def test_a_driver_that_fails_loses_no_gpus(tmp_path: Path) -> None:
    local = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    (tmp_path / "hosts.yml").write_text(
        yaml.safe_dump({"all": {"children": {"slurm_compute": {"hosts": {"n1": local, "n2": local}}}}})
    )
    (tmp_path / "slurmd").write_text(f"#!/bin/sh\ncat <<E\n{REPORT}\nE\n")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    for name in ("slurmd", "nvidia-smi"):
        (tmp_path / name).chmod(0o755)
    file = tmp_path / "group_vars/all/slurm_nodes.yml"
    file.parent.mkdir(parents=True)
    before = {"nodes": "n[1-2]", "cpus": 2, "memory_mb": 1000, "gres": [{"name": "gpu", "type": "a100", "count": 4}]}
    file.write_text(yaml.safe_dump({"slurm_measured_nodes": [before]}))
    assert "NVIDIA-SMI has failed" in measure(tmp_path, status=2)
    assert yaml.safe_load(file.read_text())["slurm_measured_nodes"] == [before]
