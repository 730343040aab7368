"""Ansible action: checks that a node is reachable and manageable, and has the required space and hardware."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import filter_loader

DOCUMENTATION = r"""
action: check_node
short_description: Checks a node's SSH, Python, free space in the shared directory, and declared hardware
description:
  - Reads only. An unreachable node stays in the play, with RV(reached) set to false; every problem is one line of
    RV(problems).
  - The facts C(packages) and C(getent_group) are set as ansible.builtin.package_facts and getent set them.
options:
  shared_dir: {type: path, required: true, description: The shared directory; it is looked at once it is mounted.}
  min_free_gb: {type: float, required: true, description: Least free space of the shared directory in GB.}
  apt_pins: {type: list, elements: dict, default: [], description: "Versions of packages to install (common_apt_pins)."}
  cluster: {type: str, default: "", description: "Name of the SLURM cluster, where the node controls one."}
  slurm_state_dir: {type: path, default: "", description: "Where its controller saves state."}
  hardware: {type: dict, default: {}, description: "What it is declared to have, by variable (declared_by_node)."}
author: [InfiniteContext]
"""

# A mount whose server is gone blocks forever.
SCRIPT = """
command -v python3 >/dev/null && echo python
(. /etc/os-release && echo "system $ID $VERSION_ID")
! mountpoint -q {path} || timeout 10 df -Pk {path} | tail -n 1 || echo stuck
"""
# Facts like those of package_facts and getent, without running these modules. Roles use them to skip package installs.
FACTS = """
dpkg-query --show --showformat 'package ${db:Status-Abbrev} ${Version} ${Package}\\n' 2>/dev/null
getent group | sed 's/^/group /'
"""
# Hardware as slurmd reports it, since SLURM compares that with slurm.conf; without slurmd, as the kernel reports it.
HARDWARE = """
timeout 10 env PATH="$PATH:/usr/sbin" slurmd -C 2>/dev/null || LC_ALL=C lscpu; grep ^MemTotal: /proc/meminfo
for device in {devices}; do [ -e "$device" ] || echo "missing $device"; done
nvidia=$(grep -lx 0x10de /sys/bus/pci/devices/*/vendor 2>/dev/null | sed s/vendor$/class/)
echo gpus "$(cat /dev/null $nvidia | grep -c '^0x030[02]')"
"""
# README has the same table, with what is tested on each.
SUPPORTED = {"debian 12", "debian 13", "ubuntu 24.04"}
TOO_OLD = {"ubuntu 22.04": "its SLURM 21.08, Prometheus 2.31 and node_exporter 1.3.1 lack what the configuration uses"}
# Versions that apt offers; none if the package lists were deleted, as in container images.
VERSIONS = """
ls /var/lib/apt/lists/*_Packages* >/dev/null 2>&1 && echo apt && apt-cache madison {packages}
"""
# slurmctld does not start with the state of a cluster of another name.
STATE = """
echo "cluster $(cat {folder}/clustername 2>/dev/null)"
"""
REMEDY = "correct it, or run playbooks/measure-nodes.yml to write the node's hardware"


def facts(report: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns the node's installed packages and its groups, as ansible.builtin's package_facts and getent do."""
    packages: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    for line in report:
        words = line.split()
        if words[:2] == ["package", "ii"] and len(words) == 4:
            packages.setdefault(words[3], []).append({"name": words[3], "version": words[2], "source": "apt"})
        elif words[:1] == ["group"]:
            name, *fields = line.removeprefix("group ").split(":")
            groups[name] = fields
    return {"packages": packages, "getent_group": groups} if packages else {}


def devices(hardware: dict[str, Any]) -> list[str]:
    """Returns the device files of the generic resources that the node is declared to have."""
    expand = filter_loader.get("expand_nodes").j2_function
    resources = [gres for layer in hardware.values() for gres in layer.get("gres", [])]
    return [name for gres in resources for name in expand(gres.get("file") or "")]


def unsupported(report: Iterable[str]) -> str:
    """Returns why the node's system is not supported, or an empty string."""
    name = next((line.removeprefix("system ").strip() for line in report if line.startswith("system ")), "unknown")
    if name in SUPPORTED:
        return ""
    why = TOO_OLD.get(name, "this platform is not tested on it")
    return f"{name} is not supported ({why}): install Debian 12 or 13, or Ubuntu 24.04"


def missing(node: str, hardware: dict[str, Any], report: list[str]) -> Iterator[str]:
    """Yields a line for each resource of which more is declared than the node has."""
    compare = filter_loader.get("hardware_problems").j2_function
    for variable, layer in hardware.items():
        for key, declared, found in compare(layer, "\n".join(report)):
            yield f"{variable} ({node}): {key} is {declared}, but the node has {found}: {REMEDY}"


def renamed(node: str, cluster: str, folder: str, report: Iterable[str]) -> Iterator[str]:
    """Yields a line if the controller's state belongs to a cluster of another name."""
    saved = next((line.removeprefix("cluster ").strip() for line in report if line.startswith("cluster ")), "")
    if cluster and saved not in ("", cluster):
        yield (
            f"ictx_cluster_name: {cluster}: {folder} on {node} has the state of cluster {saved}, with which "
            f"slurmctld would not start: set {saved}, or another slurm_state_dir; to rename the cluster, stop "
            f"slurmctld and delete {folder}/clustername on {node}"
        )


def unknown_versions(node: str, pins: list[dict[str, Any]], report: list[str]) -> Iterator[str]:
    """Yields a line for each pinned version that the node's repositories do not offer."""
    known: dict[str, list[str]] = {}
    for line in report:
        if match := re.fullmatch(r" *(\S+) \| (\S+) \| .*", line):
            known.setdefault(match[1], []).append(match[2])
    for pin in pins if "apt" in report else []:
        for name in pin["packages"]:
            versions = list(dict.fromkeys(known.get(name, [])))
            if not any(fnmatchcase(version, pin["version"]) for version in versions):
                there = f"have {', '.join(versions)}" if versions else "do not have the package"
                remedy = "pin another version, add a repository, or run apt-get update on the node"
                yield f"common_apt_pins ({node}): {name} {pin['version']}: the node's repositories {there}: {remedy}"


class ActionModule(ActionBase):
    """See DOCUMENTATION."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Returns the node's problems; the task succeeds even if there are some."""
        result = super().run(tmp, task_vars)
        _, arguments = self.validate_argument_spec(
            {
                "shared_dir": {"type": "path", "required": True},
                "min_free_gb": {"type": "float", "required": True},
                "apt_pins": {"type": "list", "elements": "dict", "default": []},
                "cluster": {"type": "str", "default": ""},
                "slurm_state_dir": {"type": "path", "default": ""},
                "hardware": {"type": "dict", "default": {}},
            }
        )
        variables = task_vars or {}
        node = variables["inventory_hostname"]
        shown = f"host {node} ({self._templar.template(variables.get('ansible_host', node))})"
        shared = arguments["shared_dir"]
        script = SCRIPT.format(path=shlex.quote(shared)) + FACTS
        pins = arguments["apt_pins"]
        if pins:
            packages = " ".join(shlex.quote(name) for pin in pins for name in pin["packages"])
            script += VERSIONS.format(packages=packages)
        cluster, folder = arguments["cluster"], arguments["slurm_state_dir"]
        if folder:
            script += STATE.format(folder=shlex.quote(folder))
        if hardware := arguments["hardware"]:
            script += HARDWARE.format(devices=" ".join(map(shlex.quote, devices(hardware))))
        try:
            done = self._low_level_execute_command(f"/bin/sh -c {shlex.quote(script)}")
        except AnsibleConnectionFailure as error:
            reason = str(error).strip().splitlines()[-1].removeprefix("Failed to connect to the host via ssh: ")
            remedy = "start it, or correct ansible_host, ansible_user and the SSH key"
            text = f"{shown}: cannot be reached ({reason}): {remedy}"
            return {**result, "changed": False, "reached": False, "problems": [text]}
        except AnsibleError as error:
            text = f"{shown}: cannot be managed ({str(error).strip().splitlines()[0]})"
            return {**result, "changed": False, "problems": [text]}
        found = self._problems(shown, done, shared, arguments["min_free_gb"])
        report = done["stdout_lines"]
        found = found or [
            *missing(node, hardware, report),
            *unknown_versions(node, pins, report),
            *renamed(node, cluster, folder, report),
        ]
        return {**result, "changed": False, "problems": found, "ansible_facts": facts(report)}

    @staticmethod
    def _problems(shown: str, done: dict[str, Any], shared: str, min_free_gb: float) -> list[str]:
        answer = done["stdout"].splitlines()
        if "python" not in answer:
            reason = (done["stderr"].strip() or "no response").splitlines()[-1]
            return [
                f"{shown}: Python cannot be run ({reason if done['rc'] else 'python3 is missing'}): install python3"
            ]
        if text := unsupported(answer):
            return [f"{shown}: {text}"]
        if "stuck" in answer:
            return [f"{shown}: the shared directory {shared} does not respond: check its server"]
        for line in answer:
            words = line.split()
            if len(words) >= 6 and words[-1] == shared:
                free_gb = int(words[3]) * 1024 / 1e9
                if free_gb < min_free_gb:
                    # All nodes share the directory, so the line names no node.
                    return [
                        f"the shared directory {shared} has {free_gb:.1f} GB free, needs {min_free_gb:g}: "
                        f"delete unneeded runs below {shared}/runs, or lower ictx_shared_min_free_gb"
                    ]
        return []
