"""GPUs are found by what sysfs says about them; the folders here are laid out as the kernel does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from cluster import ROOT


@pytest.fixture(scope="module")
def module() -> ModuleType:
    """Returns the Ansible module."""
    spec = importlib.util.spec_from_file_location("nvidia_pci", ROOT / "roles/nvidia_driver/library/nvidia_pci.py")
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def sysfs(folder: Path, *devices: tuple[str, str, str]) -> Path:
    """Lays out a sysfs with PCI devices of the given address, vendor and class."""
    (folder / "bus/pci/devices").mkdir(parents=True)
    for address, vendor, kind in devices:
        device = folder / "devices/pci0000:00" / address
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
        (folder / "bus/pci/devices" / address).symlink_to(device)
    return folder


def test_an_a100_board_has_gpus_and_switches(module: ModuleType, tmp_path: Path) -> None:
    found = module.look(
        sysfs(
            tmp_path,
            ("0000:47:00.0", "0x10de", "0x030200"),
            ("0000:07:00.0", "0x10de", "0x030200"),
            ("0000:c4:00.0", "0x10de", "0x068000"),
            ("0000:00:1f.0", "0x8086", "0x060100"),
        )
    )
    assert found == {"gpus": ["0000:07:00.0", "0000:47:00.0"], "nvswitches": ["0000:c4:00.0"], "nouveau": False}


def test_the_audio_function_of_a_card_is_no_gpu(module: ModuleType, tmp_path: Path) -> None:
    found = module.look(sysfs(tmp_path, ("0000:01:00.0", "0x10de", "0x030000"), ("0000:01:00.1", "0x10de", "0x040300")))
    assert found["gpus"] == ["0000:01:00.0"]


def test_the_display_of_another_vendor_is_no_gpu(module: ModuleType, tmp_path: Path) -> None:
    assert module.look(sysfs(tmp_path, ("0000:03:00.0", "0x1a03", "0x030000")))["gpus"] == []


def test_a_machine_without_a_pci_bus_has_none(module: ModuleType, tmp_path: Path) -> None:
    assert module.look(tmp_path) == {"gpus": [], "nvswitches": [], "nouveau": False}


def test_nouveau_is_noticed(module: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "module/nouveau").mkdir(parents=True)
    assert module.look(tmp_path)["nouveau"] is True
