#!/usr/bin/python
"""Ansible module: measures a node's disks, its network connections and its clock; changes nothing."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import socket
import statistics
import tempfile
import time
from contextlib import closing
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: measure_node
short_description: Measures a node's disks, its network connections and its clock
description:
  - Writes and reads a temporary file on each disk, bypassing the page cache, with fio if it is installed. Measures
    the round trip by the handshake of a TCP connection, which needs no privileges. Reads the clock offset from chrony.
options:
  disks: {type: list, elements: path, default: [], description: Folders to write to.}
  size_mb: {type: int, default: 256, description: Largest file.}
  seconds: {type: float, default: 10, description: Longest time of a write and of a read.}
  peers: {type: dict, default: {}, description: "Hosts by name, each with its address and port."}
  tries: {type: int, default: 10, description: Connections to each.}
attributes:
  check_mode: {support: full}
author: [InfiniteContext]
"""

EXAMPLES = r"""
- name: Measure the node
  measure_node:
    disks: [/var/lib]
    peers: {gpu2: {address: 192.0.2.22, port: 22}}
"""

RETURN = r"""
disks: {type: dict, description: "By folder: write and read in bytes a second, or a problem.", returned: always}
peers: {type: dict, description: "By name: seconds of a round trip (median), failed tries.", returned: always}
clock: {type: dict, description: "The offset in seconds by chrony, or a problem.", returned: always}
"""

BLOCK = 1 << 20
SPARE = 0.05
"""Share of a file system that is kept free."""


def direct(path: str, flags: int) -> int:
    """Opens a file for direct I/O if the file system supports it (tmpfs does not)."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o600)


def rate(fd: int, move: Any, size: int, seconds: float) -> tuple[int, float]:
    """Transfers blocks until the size or the time is reached; returns bytes, and bytes per second with the flush."""
    begun, moved = time.perf_counter(), 0
    while moved < size and time.perf_counter() - begun < seconds:
        done = move()
        if done <= 0:
            break
        moved += done
    os.fsync(fd)
    return moved, moved / max(time.perf_counter() - begun, 1e-9)


def plain(path: str, size: int, seconds: float) -> dict[str, Any]:
    """Returns rates of one sequential write and read of blocks of 1 MiB."""
    # Direct I/O needs page-aligned memory.
    with closing(mmap.mmap(-1, BLOCK)) as block:
        block.write(os.urandom(BLOCK))
        fd = direct(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            written, write = rate(fd, lambda: os.write(fd, block), size, seconds)
        finally:
            os.close(fd)
        fd = direct(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            _, read = rate(fd, lambda: os.readv(fd, [block]), written, seconds)
        finally:
            os.close(fd)
    return {"write": write, "read": read, "tool": "plain"}


def fio(module: AnsibleModule, path: str, size: int, seconds: float) -> dict[str, Any]:
    """Returns rates of fio's sequential write and read. Raises OSError for what fio reports."""
    found: dict[str, Any] = {"tool": "fio"}
    for way in ("write", "read"):
        command = [
            "fio", "--name=ictx", f"--filename={path}", f"--rw={way}", "--bs=1M", f"--size={size}", "--direct=1",
            "--ioengine=psync", "--end_fsync=1", f"--runtime={seconds}", "--output-format=json",
        ]  # fmt: skip
        status, out, err = module.run_command(command)
        if status:
            raise OSError(f"fio: {(err or out).strip().splitlines()[-1]}")
        # fio may print notes before the report.
        found[way] = float(json.loads(out[out.index("{") :])["jobs"][0][way]["bw_bytes"])
    return found


def disk(module: AnsibleModule, folder: str, size: int, seconds: float) -> dict[str, Any]:
    """Returns a folder's rates, or `problem`; removes the temporary file."""
    try:
        space = os.statvfs(folder)
        free = space.f_bavail * space.f_frsize - int(SPARE * space.f_blocks * space.f_frsize)
        if free < size:
            return {"problem": f"{max(free, 0) >> 20} MiB are free for the test, {size >> 20} are needed"}
        with tempfile.TemporaryDirectory(prefix=".ictx-measure-", dir=folder) as own:
            path = os.path.join(own, "data")
            if shutil.which("fio"):
                try:
                    return fio(module, path, size, seconds)
                except OSError as error:
                    # For example, if the file system has no direct I/O.
                    return {**plain(path, size, seconds), "note": str(error)}
            return plain(path, size, seconds)
    except OSError as error:
        return {"problem": error.strerror or str(error)}


def way(address: str, port: int, tries: int) -> dict[str, Any]:
    """Returns the median round trip to a host, and how many connections failed."""
    times, problem = [], ""
    for _ in range(tries):
        begun = time.perf_counter()
        try:
            with socket.create_connection((address, port), timeout=2):
                times.append(time.perf_counter() - begun)
        except OSError as error:
            problem = error.strerror or str(error)
    found: dict[str, Any] = {"failed": tries - len(times), "tries": tries}
    return (
        found | ({"round_trip": statistics.median(times)} if times else {}) | ({"problem": problem} if problem else {})
    )


def clock(module: AnsibleModule) -> dict[str, Any]:
    """Returns chrony's estimate of how far the clock is off, in seconds."""
    if not shutil.which("chronyc"):
        return {"problem": "chrony is not installed"}
    status, out, err = module.run_command(["chronyc", "-c", "tracking"])
    fields = out.strip().split(",")
    if status or len(fields) < 14:
        return {"problem": f"chronyc: {(err or out).strip()}"}
    if fields[13] == "Not synchronised":
        return {"problem": "not synchronised"}
    return {"offset": float(fields[4])}


def main() -> None:
    """Runs the module."""
    module = AnsibleModule(
        {
            "disks": {"type": "list", "elements": "path", "default": []},
            "size_mb": {"type": "int", "default": 256},
            "seconds": {"type": "float", "default": 10},
            "peers": {"type": "dict", "default": {}},
            "tries": {"type": "int", "default": 10},
        },
        supports_check_mode=True,
    )
    wanted, size = module.params, module.params["size_mb"] << 20
    for name, host in wanted["peers"].items():
        if not isinstance(host, dict) or set(host) - {"address", "port"} or "address" not in host:
            module.fail_json(msg=f"peers: {name} needs an address, and may have a port")
    module.exit_json(
        changed=False,
        disks={folder: disk(module, folder, size, wanted["seconds"]) for folder in wanted["disks"]},
        peers={
            name: way(host["address"], int(host.get("port", 22)), wanted["tries"])
            for name, host in wanted["peers"].items()
        },
        clock=clock(module),
    )


if __name__ == "__main__":
    main()
