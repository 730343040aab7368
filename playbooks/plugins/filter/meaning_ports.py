"""Ansible filter: rules of preflight (meaning.py) about the ports that services listen on."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

Problem = tuple[str, str, str]

# Fixed ports, by group.
FIXED = {
    "slurm_controller": {6817: "slurmctld"},
    "slurm_compute": {6818: "slurmd"},
    "slurm_database": {6819: "slurmdbd", 3306: "MariaDB"},
    "storage_server": {2049: "NFS"},
    "k3s_server": {6443: "the API of Kubernetes", 2379: "etcd", 2380: "etcd", 10250: "the kubelet"},
    "k3s_agent": {10250: "the kubelet"},
}
# Services that Prometheus and other hosts connect to at the host's address.
REACHED = ("alertmanager", "blackbox_exporter", "dcgm_exporter", "mysqld_exporter", "node_exporter", "prometheus")


def each_once(site: Any) -> Iterator[Problem]:
    """No two services of a host listen on the same port."""
    for host in site.hosts("all"):
        taken: dict[str, list[str]] = defaultdict(list)
        for name in sorted(site.of(host, "_listening") or []):
            value = str(site.of(host, name, ""))
            port = re.fullmatch(r"(?:.*:)?(\d+)", value)
            if port and not value.startswith("127."):
                taken[port[1]].append(name)
        for port_number, names in taken.items():
            if len(names) > 1:
                yield names[1], f"{names[0]} also listens on port {port_number}", host


def free(site: Any) -> Iterator[Problem]:
    """Services do not use ports of other services, and listen where their clients can connect."""
    for host in site.hosts("all"):
        fixed = {port: what for group, own in FIXED.items() if host in site.hosts(group) for port, what in own.items()}
        local: dict[str, list[str]] = defaultdict(list)
        for name in sorted(site.of(host, "_listening") or []):
            value = str(site.of(host, name, ""))
            found = re.fullmatch(r"(?:(.*):)?(\d+)", value)
            if not found:
                continue
            what = fixed.get(int(found[2]))
            if what and name not in ("firewall_ssh_port", "k3s_api_port"):
                yield name, f"{value}: {what} uses port {found[2]} on this host: choose another", host
            if 30000 <= int(found[2]) <= 32767 and host in (*site.hosts("k3s_server"), *site.hosts("k3s_agent")):
                yield name, f"{value}: ports 30000 to 32767 are reserved for Kubernetes' Services: choose another", host
            at_home = (found[1] or "").startswith("127.") or found[1] in ("localhost", "[::1]")
            if at_home and name.removesuffix("_listen") in REACHED:
                yield name, f"{value}: Prometheus connects to the host's address: remove the address", host
            local[found[2]].append(name)
            homes = [other for other in local[found[2]] if str(site.of(host, other, "")).startswith("127.")]
            if len(local[found[2]]) > 1 and homes:
                yield name, f"{local[found[2]][0]} also listens on port {found[2]}", host


def firewall(site: Any) -> Iterator[Problem]:
    """Openings have sources and valid ports."""
    for entry in site.get("firewall_extra") or []:
        for key, meant in (("from", "nobody"), ("ports", "all of them")):
            if entry.get(key) == []:
                text = f"{entry['what']}: {key} is empty, which means {meant}: list some, or remove it for all"
                yield "firewall_extra", text, ""
        for text in map(str, entry.get("ports") or []):
            ends = [int(end) for end in text.split("-")]
            if ends != sorted(ends) or not all(0 < end < 65536 for end in ends):
                yield "firewall_extra", f"{entry['what']}: {text} must be ports from 1 to 65535, the lower first", ""


def rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return (each_once, free, firewall)


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"meaning_ports": rules}
