"""A node is rebooted for another driver only, no driver is upgraded unattended, and removed modes are forgotten."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from cluster import ROOT
from programs import play

ROLE = ROOT / "roles/nvidia_driver"
MODINFO = '#!/bin/sh\ncase $2 in {}) echo {} ;; *) echo "modinfo: ERROR: Module $2 not found." >&2; exit 1 ;; esac\n'


@pytest.mark.parametrize(
    ("loaded", "module", "built", "reboot"),
    [
        ("580.95.05", "nvidia", "580.95.05", False),
        ("580.65.06", "nvidia", "580.95.05", True),
        ("580.95.0", "nvidia", "580.95.05", True),
        ("535.261.03", "nvidia-current", "535.261.03", False),
        ("550.163.01", "nvidia-current-open", "550.163.01", False),
        ("535.216.01", "nvidia-current-open", "535.261.03", True),
        ("", "none", "", False),
    ],
)
def test_a_node_is_rebooted_for_another_driver_only(
    tmp_path: Path, loaded: str, module: str, built: str, reboot: bool
) -> None:
    task = yaml.safe_load((ROOT / "playbooks/tasks/restart_machine.yml").read_text())[0]
    (tmp_path / "modinfo").write_text(MODINFO.format(module, built))
    (tmp_path / "modinfo").chmod(0o755)
    (tmp_path / "version").write_text(loaded)
    text = task["ansible.builtin.shell"]["cmd"].replace("/sys/module/nvidia/version", str(tmp_path / "version"))
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", text], env=environment, check=True, capture_output=True, text=True)
    assert ("the driver" in done.stdout) == reboot


def test_unattended_upgrades_leave_the_driver_and_keep_other_exclusions(tmp_path: Path) -> None:
    task = next(
        task for task in yaml.safe_load((ROLE / "tasks/install.yml").read_text()) if "unattended" in task["name"]
    )
    (tmp_path / "50").write_text('Unattended-Upgrade::Package-Blacklist { "libc6"; };\n')
    (tmp_path / "52").write_text(task["ansible.builtin.copy"]["content"])
    command = ["apt-config", f"--config-file={tmp_path}/50", f"--config-file={tmp_path}/52", "dump"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    for name in ("libc6", "nvidia-", "libnvidia-", "libcuda"):
        assert f'Unattended-Upgrade::Package-Blacklist:: "{name}";' in done.stdout


@pytest.mark.parametrize(
    ("declared", "before", "runs"), [(True, False, True), (False, True, True), (False, False, False)]
)
def test_modes_that_are_no_longer_declared_are_not_set_at_the_next_boot(
    tmp_path: Path, declared: bool, before: bool, runs: bool
) -> None:
    task = yaml.safe_load((ROLE / "tasks/main.yml").read_text())[-1]
    known = {
        "nvidia_driver_gpus": ["0000:07:00.0"],
        "_nvidia_driver_with_modes": declared,
        "_nvidia_driver_declared": {"stat": {"exists": before}},
    }
    done = play(tmp_path, [{"debug": {"msg": "modes are set"}, "when": task["when"]}], known)
    assert done.returncode == 0, done.stdout
    assert ("modes are set" in done.stdout) == runs


def test_an_exporter_that_no_repository_has_is_reported_with_the_remedy(tmp_path: Path) -> None:
    tasks = yaml.safe_load((ROOT / "roles/dcgm_exporter/tasks/main.yml").read_text())
    install = next(task for task in tasks if "block" in task)["block"][0]
    assert install["block"][0].pop("ansible.builtin.apt")["name"] == "{{ dcgm_exporter_packages }}"
    install["block"][0]["fail"] = {"msg": "No package matching 'datacenter-gpu-manager-exporter' is available"}
    done = play(tmp_path, [install], {})
    reported = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0
    assert "cannot install the GPU exporter: No package matching" in reported
    assert "set nvidia_driver_source to nvidia" in reported
