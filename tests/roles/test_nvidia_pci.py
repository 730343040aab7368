"""GPUs are found in sysfs; the tests lay out folders as the kernel does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from cluster import ROOT
from programs import play

DEFAULTS = yaml.safe_load((ROOT / "roles/nvidia_driver/defaults/main.yml").read_text())


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
    """Lays out a sysfs with PCI devices of the given address, vendor and class; GPUs are A100."""
    (folder / "bus/pci/devices").mkdir(parents=True)
    for address, vendor, kind in devices:
        device = folder / "devices/pci0000:00" / address
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
        (device / "device").write_text("0x20b0\n")
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
    assert found == {
        "gpus": ["0000:07:00.0", "0000:47:00.0"],
        "kernel_modules": ["open", "proprietary"],
        "nvswitches": ["0000:c4:00.0"],
        "nvlink5": False,
        "nouveau": False,
        "loaded": "",
        "secure_boot": False,
    }


def test_switches_of_nvlink_5_are_managed_through_infiniband(module: ModuleType, tmp_path: Path) -> None:
    adapters = ("0000:05:00.0", "0x15b3", "0x020700"), ("0000:15:00.0", "0x15b3", "0x020700")
    other = "0000:25:00.0", "0x1002", "0x030200"
    folder = sysfs(tmp_path, ("0000:1b:00.0", "0x10de", "0x030200"), *adapters, other)
    devices = folder / "bus/pci/devices"
    (devices / "0000:25:00.0/vpd").write_bytes(b"SW_MNG")
    # Reading fails, as for a device that does not answer.
    (devices / "0000:05:00.0/vpd").mkdir()
    assert module.look(folder)["nvlink5"] is False
    (devices / "0000:15:00.0/vpd").write_bytes(b"\x82\x1a\x00Nvidia BlueField\x90V0SW_MNG\xff")
    assert module.look(folder)["nvlink5"] is True


def test_the_audio_function_of_a_card_is_no_gpu(module: ModuleType, tmp_path: Path) -> None:
    found = module.look(sysfs(tmp_path, ("0000:01:00.0", "0x10de", "0x030000"), ("0000:01:00.1", "0x10de", "0x040300")))
    assert found["gpus"] == ["0000:01:00.0"]


def test_the_display_of_another_vendor_is_no_gpu(module: ModuleType, tmp_path: Path) -> None:
    assert module.look(sysfs(tmp_path, ("0000:03:00.0", "0x1a03", "0x030000")))["gpus"] == []


def test_a_machine_without_a_pci_bus_has_none(module: ModuleType, tmp_path: Path) -> None:
    found = module.look(tmp_path)
    assert (found["gpus"], found["nvswitches"], found["nouveau"]) == ([], [], False)


def test_nouveau_is_noticed(module: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "module/nouveau").mkdir(parents=True)
    assert module.look(tmp_path)["nouveau"] is True


def test_the_loaded_version_is_read(module: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "module/nvidia").mkdir(parents=True)
    (tmp_path / "module/nvidia/version").write_text("570.86.15\n")
    assert module.look(tmp_path)["loaded"] == "570.86.15"


@pytest.mark.parametrize(("value", "enforced"), [(b"\6\0\0\0\1", True), (b"\6\0\0\0\0", False), (b"", False)])
def test_secure_boot_is_what_the_firmware_has(module: ModuleType, tmp_path: Path, value: bytes, enforced: bool) -> None:
    variable = tmp_path / module.SECURE_BOOT
    variable.parent.mkdir(parents=True)
    variable.write_bytes(value)
    assert module.look(tmp_path)["secure_boot"] is enforced


V100, T4, A100, H100, GH200, B200 = 0x1DB1, 0x1EB8, 0x20B0, 0x2330, 0x2342, 0x2901


@pytest.mark.parametrize(
    ("ids", "fit"),
    [
        ([V100], ["proprietary"]),
        ([T4], ["open", "proprietary"]),
        ([A100] * 4, ["open", "proprietary"]),
        ([H100], ["open", "proprietary"]),
        ([GH200], ["open"]),
        ([0x2348], ["open"]),
        ([0x2335], ["open", "proprietary"]),  # H200
        ([B200], ["open"]),
        ([V100, T4], ["proprietary"]),
        ([A100, B200], ["open"]),
        ([V100, B200], []),
    ],
)
def test_the_generation_decides_which_kernel_modules_run(module: ModuleType, ids: list[int], fit: list[str]) -> None:
    assert module.kernel_modules(ids) == fit


def preflight(folder: Path, modules: list[str], **variables: Any) -> tuple[bool, str]:
    """Returns whether the driver's checks pass on a node whose GPUs such modules support, and the output."""
    tasks = yaml.safe_load((ROOT / "roles/nvidia_driver/tasks/preflight.yml").read_text())
    check = next(task for task in tasks if task["name"] == "Validate that the driver supports every GPU of the node")
    known = {"_nvidia_driver_pci": {"kernel_modules": modules}, "nvidia_driver_gpus": ["0000:07:00.0"]}
    done = play(folder, [check], {**DEFAULTS, **known, **variables})
    return done.returncode == 0, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    ("modules", "variables", "problem"),
    [
        (["open"], {}, None),
        (["proprietary"], {}, None),
        ([], {}, "no kernel modules support all of its GPUs"),
        (["open"], {"nvidia_driver_open_kernel_modules": False}, "set nvidia_driver_open_kernel_modules to true"),
        (["proprietary"], {"nvidia_driver_branch": "590"}, "set nvidia_driver_branch to 580"),
        (["open", "proprietary"], {"nvidia_driver_branch": "590"}, None),
    ],
)
def test_a_driver_that_cannot_run_the_gpus_is_refused(
    tmp_path: Path, modules: list[str], variables: dict[str, Any], problem: str | None
) -> None:
    passed, reported = preflight(tmp_path, modules, **variables)
    assert passed == (problem is None), reported
    assert (problem or "") in reported


@pytest.mark.parametrize(
    ("loaded", "variables", "problem"),
    [
        ("", {}, None),
        ("580.95.05", {}, None),
        ("580.95.05", {"nvidia_driver_version": "580.95.05-1"}, None),
        ("570.86.15", {}, "runs driver 570.86.15, but the inventory sets nvidia_driver_branch 580"),
        ("5801.1", {}, "runs driver 5801.1"),
        (
            "580.95.05",
            {"nvidia_driver_version": "580.105.08"},
            "sets nvidia_driver_version 580.105.08: drain and upgrade it",
        ),
        ("570.86.15", {"nvidia_driver_allow_reboot": True}, None),
        ("550.163.01", {"_nvidia_driver_pin": ""}, None),
    ],
)
def test_a_driver_in_use_is_not_replaced_by_another_version(
    tmp_path: Path, loaded: str, variables: dict[str, Any], problem: str | None
) -> None:
    tasks = yaml.safe_load((ROOT / "roles/nvidia_driver/tasks/preflight.yml").read_text())
    check = next(task for task in tasks if task["name"] == "Validate that the loaded driver is the declared one")
    known = {
        "_nvidia_driver_pci": {"loaded": loaded},
        "nvidia_driver_gpus": ["0000:07:00.0"],
        "_nvidia_driver_pin": "x",
    }
    done = play(tmp_path, [check], {**DEFAULTS, **known, **variables})
    reported = " ".join((done.stdout + done.stderr).split())
    assert (done.returncode == 0) == (problem is None), reported
    assert (problem or "") in reported


@pytest.mark.parametrize(
    ("kernel", "packages", "metapackages"),
    [
        ("6.1.0-18-amd64", "", ["amd64"]),
        ("6.1.0-18-cloud-amd64", "", ["cloud-amd64"]),
        ("6.12.9+bpo-amd64", "", ["amd64"]),
        ("6.12.57+deb13-arm64", "", ["arm64"]),
        ("6.8.0-31-generic", "", ["generic"]),
        ("6.8.0-1021-nvidia-64k", "", ["nvidia-64k"]),
        ("6.1.0-18-amd64", "installed linux-image-6.1.0-18-amd64\ninstalled linux-image-amd64", ["amd64"]),
        ("6.11.0-26-generic", "installed linux-image-generic-hwe-24.04", ["generic-hwe-24.04"]),
        ("6.8.0-31-generic", "installed linux-image-virtual\nconfig-files linux-image-generic", ["virtual"]),
        (
            "6.8.0-1021-aws",
            "installed linux-image-aws-lts-24.04\nnot-installed linux-image-unsigned-x",
            ["aws-lts-24.04"],
        ),
        ("6.1.0-18-amd64", "installed linux-image-amd64\ninstalled linux-image-amd64-dbg", ["amd64"]),
        ("6.8.0-31-generic", "installed linux-image-unsigned-6.8.0-31-generic", ["generic"]),
    ],
)
def test_headers_follow_the_kernel(tmp_path: Path, kernel: str, packages: str, metapackages: list[str]) -> None:
    known = yaml.safe_load((ROOT / "roles/nvidia_driver/vars/main.yml").read_text())
    check = {"assert": {"that": "_nvidia_driver_headers == wanted", "fail_msg": "{{ _nvidia_driver_headers }}"}}
    wanted = [f"linux-headers-{name}" for name in (kernel, *metapackages)]
    given = {"ansible_facts": {"kernel": kernel}, "_nvidia_driver_kernels": {"stdout": packages}, "wanted": wanted}
    done = play(tmp_path, [check], known | given)
    assert done.returncode == 0, done.stdout + done.stderr


def test_headers_that_repositories_no_longer_have_are_reported_with_the_remedy(tmp_path: Path) -> None:
    tasks = yaml.safe_load((ROOT / "roles/nvidia_driver/tasks/install.yml").read_text())
    block = next(task for task in tasks if task["name"] == "Install the kernel headers")
    assert block["block"][0].pop("ansible.builtin.apt")["name"] == "{{ _nvidia_driver_headers }}"
    block["block"][0]["fail"] = {"msg": "No package matching 'linux-headers-6.1.0-25-amd64' is available"}
    unchanged = {"changed": False}
    known = {"_nvidia_driver_repository": unchanged, "_nvidia_driver_non_free": unchanged}
    done = play(tmp_path, [block], known | {"ansible_facts": {"kernel": "6.1.0-25-amd64"}})
    reported = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0
    assert "lacks headers for its kernel 6.1.0-25-amd64: No package matching" in reported
    assert "playbooks/maintain.yml -e change=packages" in reported
