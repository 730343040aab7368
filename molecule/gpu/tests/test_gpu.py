"""The roles of gpu.yml on nodes with different GPUs: what they install, and what they refuse."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import testinfra
from testinfra.host import Host

STATE = Path(os.environ["ICTX_LAB_STATE"])
DRIVER = "580.95.05"


def node(name: str) -> Host:
    """Returns testinfra's host of a node."""
    return testinfra.get_host(f"ssh://{name}", ssh_config=str(STATE / "ssh/config"))


def provision(folder: Path, name: str, *arguments: str) -> tuple[int, str]:
    """Runs playbooks/gpu.yml on one node; returns status and output."""
    (folder / "more.yml").write_text(f"gpu: {{hosts: {{{name}: }}}}\n")
    inventories = ["-i", os.environ["MOLECULE_INVENTORY"], "-i", str(folder / "more.yml"), "--limit", name]
    command = ["ansible-playbook", *inventories, os.environ["MOLECULE_PLAYBOOK"], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def version(host: Host, package: str) -> str:
    """Returns a package's version; empty if it is not installed."""
    found = host.run(f"dpkg-query --show --showformat='${{Version}}' {package}")
    return str(found.stdout) if found.rc == 0 else ""


def test_a_node_without_a_gpu_is_left_alone() -> None:
    none = node("none")
    for path in ("modprobe.d/nouveau-blacklist.conf", "apt/sources.list.d/nvidia.sources", "nvidia-container-runtime"):
        assert not none.file(f"/etc/{path}").exists, path


@pytest.mark.parametrize("name", ["t4", "a100"])
def test_a_driver_is_installed_loaded_and_described_to_containers(name: str) -> None:
    host = node(name)
    assert version(host, "nvidia-kernel-open-dkms") == f"{DRIVER}-1"
    assert host.file("/sys/module/nvidia/version").content_string.strip() == DRIVER
    assert host.service("nvidia-persistenced").is_running
    assert "--persistence-mode" in host.check_output("systemctl show --property=ExecStart nvidia-persistenced")
    assert host.file("/dev/nvidia-uvm").exists
    assert f"driver: {DRIVER}" in host.file("/var/run/cdi/nvidia.yaml").content_string
    assert host.service("nvidia-cdi-refresh.path").is_enabled
    assert host.service("nvidia-cdi-refresh.service").is_enabled
    assert "ictx.conf" in host.check_output("systemctl show --property=DropInPaths nvidia-cdi-refresh.service")


def test_headers_follow_the_kernel() -> None:
    kernel = node("t4").check_output("uname --kernel-release")
    assert version(node("t4"), f"linux-headers-{kernel}")
    assert version(node("t4"), re.sub(r"^[0-9][^-]*(-[0-9]+)?-", "linux-headers-", kernel))


def test_nouveau_is_kept_out_of_the_initramfs_too(tmp_path: Path) -> None:
    host = node("t4")
    assert "etc/modprobe.d/nouveau-blacklist.conf" in host.file("/var/lib/stand-in/initramfs").content_string.split()
    # As after a run that was killed before it updated the initramfs.
    host.check_output("truncate --size=0 /var/lib/stand-in/initramfs")
    status, text = provision(tmp_path, "t4")
    assert status == 0, text
    assert "etc/modprobe.d/nouveau-blacklist.conf" in host.file("/var/lib/stand-in/initramfs").content_string.split()


def test_the_fabric_manager_has_the_driver_s_version_and_runs_only_where_switches_are() -> None:
    a100 = node("a100")
    assert "580.105.08-1" in a100.check_output("apt-cache madison nvidia-fabricmanager")
    assert version(a100, "nvidia-fabricmanager") == f"{DRIVER}-1"
    assert a100.service("nvidia-fabricmanager").is_running
    assert not version(node("t4"), "nvidia-fabricmanager")


def test_a_fabric_manager_of_another_version_is_replaced(tmp_path: Path) -> None:
    a100 = node("a100")
    a100.check_output("apt-get install --yes nvidia-fabricmanager=580.105.08-1")
    assert a100.run("systemctl restart nvidia-fabricmanager").rc != 0
    status, text = provision(tmp_path, "a100")
    assert status == 0, text
    assert version(a100, "nvidia-fabricmanager") == f"{DRIVER}-1"
    assert a100.service("nvidia-fabricmanager").is_running


def test_a_gpu_is_divided_as_the_inventory_has_it_and_again_at_each_boot() -> None:
    a100 = node("a100")
    devices = re.findall(r"^GPU (\d)|^  MIG (\S+)", a100.check_output("nvidia-smi -L"), re.MULTILINE)
    assert [one or two for one, two in devices] == ["0", "1", "2", "3", "3g.20gb", "3g.20gb"]
    assert a100.service("ictx-gpu-modes").is_enabled
    a100.check_output("nvidia-smi mig -dgi -i 3")
    a100.check_output("systemctl start ictx-gpu-modes")
    assert a100.check_output("nvidia-smi -L").count("MIG 3g.20gb") == 2


def test_secure_boot_is_reported_and_a_key_that_the_firmware_does_not_know_is_named(tmp_path: Path) -> None:
    began = node("h100").file("/proc/1/stat").content_string.split()[21]
    status, text = provision(tmp_path, "h100", "-e", "nvidia_driver_allow_reboot=true")
    assert status != 0
    assert "h100 enforces Secure Boot" in text
    assert "Key was rejected by service" in text
    assert "mokutil --import /var/lib/dkms/mok.pub" in text
    assert node("h100").file("/proc/1/stat").content_string.split()[21] == began, "the node was restarted"
    node("h100").check_output("touch /var/lib/stand-in/enrolled")
    status, text = provision(tmp_path, "h100")
    assert status == 0, text
    assert node("h100").file("/sys/module/nvidia/version").content_string.strip() == DRIVER


def test_a_driver_of_another_branch_is_not_replaced_while_it_may_be_in_use(tmp_path: Path) -> None:
    stale = node("stale")
    stale.check_output("sh -c 'echo 570.86.15 >/sys/module/nvidia/version'")
    status, text = provision(tmp_path, "stale")
    assert status != 0
    assert "stale runs driver 570.86.15, but the inventory sets nvidia_driver_branch 580" in text
    assert not version(stale, "nvidia-kernel-open-dkms")
    stale.check_output("sh -c 'echo 580.65.06 >/sys/module/nvidia/version'")


def test_a_driver_that_is_not_the_installed_one_is_refused_until_the_node_was_restarted(tmp_path: Path) -> None:
    for _ in range(2):
        status, text = provision(tmp_path, "stale")
        assert status != 0
        assert f"stale runs driver 580.65.06, but {DRIVER} is installed" in text
        assert "playbooks/maintain.yml -e change=driver" in text
    node("stale").check_output(f"sh -c 'echo {DRIVER} >/sys/module/nvidia/version'")
    status, text = provision(tmp_path, "stale")
    assert status == 0, text
    status, text = provision(tmp_path, "stale")
    assert status == 0, text
    assert "changed=0" in text
