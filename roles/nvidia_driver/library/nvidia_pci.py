#!/usr/bin/python
"""Ansible module: which NVIDIA devices are on the PCI bus, and which driver has them?"""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: nvidia_pci
short_description: Finds NVIDIA's GPUs and NVSwitches on the PCI bus
description:
  - Reads only. Needs no package (no C(lspci)): it looks at sysfs.
options:
  sysfs: {type: path, default: /sys, description: Where sysfs is mounted.}
author: [InfiniteContext]
"""

EXAMPLES = r"""
- name: Look for GPUs
  nvidia_pci:
  register: found
"""

RETURN = r"""
gpus: {type: list, elements: str, returned: always, description: PCI addresses of the GPUs.}
nvswitches: {type: list, elements: str, returned: always, description: PCI addresses of the NVSwitches.}
nouveau: {type: bool, returned: always, description: Whether the nouveau driver is loaded.}
"""

VENDOR = "0x10de"
# The first two bytes of a PCI class; a GPU's audio and USB functions have others.
GPU_CLASSES = ("0x0300", "0x0302")  # VGA controller, 3D controller
NVSWITCH_CLASS = "0x0680"  # bridge of another kind


def devices(sysfs: Path) -> list[tuple[str, str]]:
    """Returns address and class (its first two bytes, C(0x0302)) of each NVIDIA function, by address."""
    found = []
    for device in sorted((sysfs / "bus/pci/devices").glob("*")):
        if (device / "vendor").read_text().strip() == VENDOR:
            found.append((device.name, (device / "class").read_text().strip()[:6]))
    return found


def look(sysfs: Path) -> dict:
    """Returns the module's result."""
    found = devices(sysfs)
    return {
        "gpus": [address for address, kind in found if kind in GPU_CLASSES],
        "nvswitches": [address for address, kind in found if kind == NVSWITCH_CLASS],
        "nouveau": (sysfs / "module/nouveau").exists(),
    }


def main() -> None:
    """Runs the module."""
    module = AnsibleModule({"sysfs": {"type": "path", "default": "/sys"}}, supports_check_mode=True)
    module.exit_json(changed=False, **look(Path(module.params["sysfs"])))


if __name__ == "__main__":
    main()
