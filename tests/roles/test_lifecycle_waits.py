"""Playbooks that wait for jobs reject times for which they would not wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import ROOT

INVENTORY = """\
all:
  vars: {ansible_connection: local, ansible_become: false, ansible_python_interpreter: %s}
  children:
    slurm_controller: {hosts: {ctl: }}
    slurm_compute: {hosts: {gpu1: }}
    k3s_agent: {hosts: {gpu1: }}
    k3s_server: {}
"""
PLAY = """\
- hosts: slurm_controller
  gather_facts: false
  vars: {lifecycle_nodes: [gpu1], lifecycle_reason: test, lifecycle_minutes: "{{ wait_minutes }}"}
  tasks:
    - ansible.builtin.include_tasks: %s/playbooks/tasks/drain_nodes.yml
"""


def output(folder: Path, playbook: Path, **variables: object) -> str:
    """Runs a playbook that fails; returns its output."""
    (folder / "hosts.yml").write_text(INVENTORY % sys.executable)
    command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(folder / "hosts.yml"), str(playbook)]
    done = subprocess.run(
        [*command, "--extra-vars", json.dumps(variables)],
        cwd=ROOT,
        env=os.environ | {"ANSIBLE_HOME": str(folder), "ANSIBLE_CACHE_PLUGIN": "memory"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("minutes", [0, "2h", -1])
def test_no_node_is_lent_without_waiting_for_its_jobs(tmp_path: Path, minutes: object) -> None:
    printed = output(tmp_path, ROOT / "playbooks/lend.yml", nodes="gpu1", to="kubernetes", wait_minutes=minutes)
    assert f"wait_minutes is {minutes}: set it to a number above 0; nothing was changed" in " ".join(printed.split())


@pytest.mark.parametrize("minutes", ["2h", -1])
def test_no_node_is_drained_with_a_time_that_is_no_number(tmp_path: Path, minutes: object) -> None:
    play = tmp_path / "play.yml"
    play.write_text(PLAY % ROOT)
    assert f"wait_minutes is {minutes}: set it to a number of minutes" in output(tmp_path, play, wait_minutes=minutes)
