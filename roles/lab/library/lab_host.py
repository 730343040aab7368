#!/usr/bin/python
"""Ansible module: checks whether this machine can run the lab, and reports its quirks."""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: lab_host
short_description: Checks whether this machine can run the lab, and reports its quirks
description:
  - Changes nothing. RV(problems) has one line with a remedy for each reason why the lab cannot run here.
  - Disk space that the lab already occupies (caches of an earlier run) counts towards the requirement.
options:
  name: {type: str, required: true, description: Prefix of the lab's container and network names.}
  subnet: {type: str, required: true, description: The lab's network.}
  nodes: {type: list, elements: str, required: true, description: Names of the lab's nodes.}
  publish: {type: list, elements: str, default: [], description: Published ports, C(ADDRESS:PORT:PORT).}
  paths: {type: list, elements: path, required: true, description: Folders whose file systems the lab fills.}
  own_paths: {type: list, elements: path, default: [], description: Folders that contain the lab's files only.}
  min_disk_gb: {type: int, required: true, description: "Disk space in GB that a lab needs, including its tests."}
  min_free_gb: {type: int, default: 0, description: Free disk space in GB that a lab with warm caches needs.}
  min_memory_gb: {type: int, required: true, description: Minimum memory in GB.}
author: [InfiniteContext]
"""

EXAMPLES = r"""
- name: Check the machine
  lab_host:
    {name: ictx, subnet: 10.203.77.0/24, nodes: [ctl, n1], paths: [/root], min_disk_gb: 20, min_memory_gb: 6}
"""

RETURN = r"""
problems: {type: list, elements: str, returned: always, description: One line per reason and remedy.}
quirks: {type: dict, returned: always, description: cgroup version, OCI runtime and hard limits.}
containers: {type: dict, returned: always, description: State of each existing container of the lab by name.}
"""

SUPPORTED = {"debian": ("12", "13"), "ubuntu": ("24.04",)}
GB = 1e9


def os_release() -> dict[str, str]:
    """Returns /etc/os-release as a mapping, without quotes."""
    pairs = (line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return {key: value.strip('"') for key, value in pairs}


def existing_parent(path: str) -> str:
    """Returns the nearest existing folder at or above `path`, to measure its disk."""
    here = Path(path)
    while not here.exists():
        here = here.parent
    return str(here)


def occupied(paths: list[str]) -> dict[int, float]:
    """Returns the GB that the existing folders occupy, by the device of their file system."""
    used: dict[int, float] = {}
    for path in filter(os.path.exists, paths):
        # du fails if files vanish during the count, but still prints the sum.
        done = subprocess.run(["du", "-sx", "--block-size=1", path], capture_output=True, text=True, check=False)
        device = os.stat(path).st_dev
        used[device] = used.get(device, 0) + int((done.stdout.split() or ["0"])[0]) / GB
    return used


def disk_problems(params: dict) -> list[str]:
    """Returns a line for every file system with too little free space."""
    places: dict[int, str] = {}
    for path in params["paths"]:
        places.setdefault(os.stat(existing_parent(path)).st_dev, path)
    used = occupied(params["own_paths"])
    found = []
    for device, path in places.items():
        free, have = shutil.disk_usage(existing_parent(path)).free / GB, used.get(device, 0)
        need = max(params["min_disk_gb"] - have, params["min_free_gb"])
        if free < need:
            found.append(
                f"free disk at {path} is {free:.1f} GB: the lab needs {need:.1f} GB more than the {have:.1f} GB it "
                f"occupies: free some, or set ICTX_CACHE and ICTX_LAB_STATE to folders on a larger disk"
            )
    return found


def port_is_taken(address: str, port: int) -> bool:
    """Returns whether the TCP port is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def routes() -> list[tuple[str, ipaddress.IPv4Network]]:
    """Returns the machine's IPv4 routes (device, network), without the default route."""
    found = []
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        device, destination, *rest = line.split()
        address, mask = (struct.pack("<L", int(word, 16)) for word in (destination, rest[5]))
        if destination != "00000000":
            network = ipaddress.IPv4Network((address, bin(int.from_bytes(mask, "big")).count("1")))
            found.append((device, network))
    return found


def free(device: str, sys: Path = Path("/sys/class/net")) -> str:
    """Returns the remedy for an occupied network; podman's bridge may remain after an interrupted lab."""
    ports = sys / device / "brif"
    if ports.is_dir() and not any(ports.iterdir()):
        return f"this bridge has no ports: if an earlier lab left it, run ip link delete {device}; or set lab_subnet"
    return "set lab_subnet to a free /24"


def podman_lines(*arguments: str) -> list[str]:
    """Returns podman's output, nothing if it is not installed."""
    if not shutil.which("podman"):
        return []
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def state(container: dict, proc: Path = Path("/proc")) -> str:
    """Returns the real state of a container of `podman ps --format json`: podman's state, or dead.

    Podman's record may outlive killed processes, and another process may have the process id by then. The container's
    own first process has the container's file, in a folder named after its id, mounted as /etc/hostname; processes of
    this machine have such folders mounted elsewhere.
    """
    if container["State"] != "running":
        return container["State"]
    try:
        mounts = (proc / str(container["Pid"]) / "mountinfo").read_text()
    except OSError:
        return "dead"
    sources = [source for _, _, _, source, point, *_ in map(str.split, mounts.splitlines()) if point == "/etc/hostname"]
    return "running" if any(container["Id"] in source for source in sources) else "dead"


def hard_limit(name: str) -> int:
    """Returns the hard resource limit of this process, -1 for unlimited."""
    import resource

    limit = resource.getrlimit(getattr(resource, name))[1]
    return -1 if limit == resource.RLIM_INFINITY else limit


def check(params: dict) -> dict:
    """Returns the module's result for the given parameters."""
    problems: list[str] = []
    name, network = params["name"], ipaddress.IPv4Network(params["subnet"])
    # As JSON, because templates of older versions cannot print the bare state.
    listed = json.loads("".join(podman_lines("ps", "-a", f"--filter=label=ictx.lab={name}", "--format=json")) or "[]")
    containers = {container["Names"][0]: state(container) for container in listed}

    release = os_release()
    versions = SUPPORTED.get(release.get("ID", ""), ())
    if release.get("VERSION_ID") not in versions:
        problems.append(
            f"operating system {release.get('PRETTY_NAME', 'unknown')} is not supported: "
            "use Debian 12 or 13, or Ubuntu 24.04"
        )
    if os.geteuid() != 0:
        problems.append("root permissions are required for system containers: run as root or a sudoer")
    namespaces = Path("/proc/sys/user/max_user_namespaces")
    if not Path("/proc/self/ns/user").exists() or (namespaces.exists() and int(namespaces.read_text()) < 1):
        problems.append(
            "user namespaces are off, so jobs cannot run in rootless containers: "
            "set sysctl user.max_user_namespaces=15000"
        )
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    if memory_gb < params["min_memory_gb"]:
        problems.append(f"memory {memory_gb:.1f} GB is too small: the lab needs {params['min_memory_gb']} GB")
    problems += disk_problems(params)
    if f"{name}" not in podman_lines("network", "ls", "--format", "{{.Name}}"):
        problems += [
            f"network {network} overlaps {route} on {device}: {free(device)}"
            for device, route in routes()
            if route.overlaps(network)
        ]
    for entry in params["publish"]:
        address, port, _ = entry.split(":")
        if not containers and port_is_taken(address, int(port)):
            problems.append(f"port {address}:{port} is in use: stop its process, or change lab_publish")

    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    return {
        "problems": problems,
        "containers": containers,
        "quirks": {
            "cgroup_version": 2 if unified else 1,
            # crun rejects system containers with cgroup v1; runc supports both.
            "oci_runtime": "crun" if unified and shutil.which("crun") else "runc",
            "nofile": hard_limit("RLIMIT_NOFILE"),
            "nproc": hard_limit("RLIMIT_NPROC"),
        },
    }


def main() -> None:
    """Runs the module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "subnet": {"type": "str", "required": True},
            "nodes": {"type": "list", "elements": "str", "required": True},
            "publish": {"type": "list", "elements": "str", "default": []},
            "paths": {"type": "list", "elements": "path", "required": True},
            "own_paths": {"type": "list", "elements": "path", "default": []},
            "min_disk_gb": {"type": "int", "required": True},
            "min_free_gb": {"type": "int", "default": 0},
            "min_memory_gb": {"type": "int", "required": True},
        },
        supports_check_mode=True,
    )
    module.exit_json(changed=False, **check(module.params))


if __name__ == "__main__":
    main()
