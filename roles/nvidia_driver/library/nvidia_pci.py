#!/usr/bin/python
"""Ansible module: finds NVIDIA devices on the PCI bus, and reports the loaded driver."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: nvidia_pci
short_description: Finds NVIDIA's GPUs and NVSwitches on the PCI bus
description:
  - Changes nothing. Reads sysfs, so it needs no C(lspci).
options:
  sysfs: {type: path, default: /sys, description: Mount point of sysfs.}
author: [InfiniteContext]
"""

EXAMPLES = r"""
- name: Find GPUs
  nvidia_pci:
  register: found
"""

RETURN = r"""
gpus: {type: list, elements: str, returned: always, description: PCI addresses of the GPUs.}
nvswitches: {type: list, elements: str, returned: always, description: PCI addresses of the NVSwitches.}
nvlink5:
  type: bool
  returned: always
  description: Whether the node manages switches of NVLink 5 (HGX B200), which are not on its PCI bus.
kernel_modules:
  type: list
  elements: str
  returned: always
  description: Kernel modules (C(open), C(proprietary)) that support all GPUs.
nouveau: {type: bool, returned: always, description: Whether the nouveau driver is loaded.}
loaded: {type: str, returned: always, description: Version of the loaded NVIDIA driver; empty if none is loaded.}
secure_boot: {type: bool, returned: always, description: Whether the firmware enforces Secure Boot.}
"""

VENDOR = "0x10de"
# The first two bytes of a PCI class; a GPU's audio and USB functions have others.
GPU_CLASSES = ("0x0300", "0x0302")  # VGA controller, 3D controller
NVSWITCH_CLASS = "0x0680"  # bridge of another kind
# From NVLink 5 on, the host manages the switches through InfiniBand functions, which contain this mark in their vital
# product data. The start script of NVIDIA's fabric manager searches for it too.
MELLANOX, SWITCH_MANAGEMENT = "0x15b3", b"SW_MNG"
# Device ids increase with the generations; the open modules' list of GPUs begins with 1E02:
# https://github.com/NVIDIA/open-gpu-kernel-modules#compatible-gpus
FIRST_TURING = 0x1E00
FIRST_BLACKWELL = 0x2900  # Ada ends at 28F8 there, B200 is 2901
GRACE_HOPPER = range(0x2340, 0x2380)  # "self-hosted Hopper" of the modules' source (detect-self-hosted.h)
# Four bytes of attributes, and the value (UEFI specification, 3.3).
SECURE_BOOT = "firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"


def devices(sysfs: Path) -> list[tuple[str, str]]:
    """Returns address and class (its first two bytes, C(0x0302)) of each NVIDIA function, by address."""
    found = []
    for device in sorted((sysfs / "bus/pci/devices").glob("*")):
        if (device / "vendor").read_text().strip() == VENDOR:
            found.append((device.name, (device / "class").read_text().strip()[:6]))
    return found


def kernel_modules(ids: list[int]) -> list[str]:
    """Returns the modules that support all GPUs with these PCI device ids."""
    fits = {
        "open": all(device >= FIRST_TURING for device in ids),
        "proprietary": all(device < FIRST_BLACKWELL and device not in GRACE_HOPPER for device in ids),
    }
    return [kind for kind, fit in fits.items() if fit]


def content(file: Path) -> bytes:
    """Returns a file's bytes, none if it does not exist or the device does not provide them."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def manages_switches(sysfs: Path) -> bool:
    """Returns whether an InfiniBand function manages switches of NVLink."""
    return any(
        SWITCH_MANAGEMENT in content(device / "vpd")
        for device in (sysfs / "bus/pci/devices").glob("*")
        if content(device / "vendor").decode().strip() == MELLANOX
    )


def look(sysfs: Path) -> dict:
    """Returns the module's result."""
    found = devices(sysfs)
    gpus = [address for address, kind in found if kind in GPU_CLASSES]
    return {
        "gpus": gpus,
        "kernel_modules": kernel_modules(
            [int((sysfs / "bus/pci/devices" / gpu / "device").read_text(), 16) for gpu in gpus]
        ),
        "nvswitches": [address for address, kind in found if kind == NVSWITCH_CLASS],
        "nvlink5": manages_switches(sysfs),
        "nouveau": (sysfs / "module/nouveau").exists(),
        "loaded": content(sysfs / "module/nvidia/version").decode().strip(),
        "secure_boot": content(sysfs / SECURE_BOOT)[4:5] == b"\1",
    }


def main() -> None:
    """Runs the module."""
    module = AnsibleModule({"sysfs": {"type": "path", "default": "/sys"}}, supports_check_mode=True)
    module.exit_json(changed=False, **look(Path(module.params["sysfs"])))


if __name__ == "__main__":
    main()
