"""Ansible filter: rules of preflight (meaning.py) about hosts, groups, people and the ports of services."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any

Problem = tuple[str, str, str]

# Ports that no variable changes, by group.
FIXED = {
    "slurm_controller": {6817: "slurmctld"},
    "slurm_compute": {6818: "slurmd"},
    "slurm_database": {6819: "slurmdbd", 3306: "MariaDB"},
    "storage_server": {2049: "NFS"},
    "k3s_server": {6443: "the API of Kubernetes", 2379: "etcd", 2380: "etcd", 10250: "the kubelet"},
    "k3s_agent": {10250: "the kubelet"},
}
# Where Prometheus and its hosts reach each other by the host's address.
REACHED = ("alertmanager", "blackbox_exporter", "dcgm_exporter", "mysqld_exporter", "node_exporter", "prometheus")
KEY = re.compile(r"(?:^|.*[\s,\"])((?:ssh|ecdsa|sk-ssh|sk-ecdsa)-[a-z0-9@.-]+)(?: +(\S+).*)?$")


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def addresses(site: Any) -> Iterator[Problem]:
    """Addresses are written out, of hosts, and reached from other hosts."""
    seen: dict[str, list[str]] = defaultdict(list)
    several = len(site.hosts("all")) > 1
    for host in site.hosts("all"):
        if site.of(host, "ansible_connection") == "local" and not site.of(host, "ictx_address"):
            continue
        name = "ictx_address" if site.of(host, "ictx_address") else "ansible_host"
        text = site.address(host)
        address = _ip(text)
        if address is None and text != host and re.fullmatch(r"[0-9.]+", text):
            yield name, f"{text} is no address: four numbers from 0 to 255, without zeros before them", host
        elif text == "localhost" or (address and address.is_loopback):
            if several:
                what = "is this host for every other one: set ictx_address to one that they reach"
                yield name, f"{text} {what}", host
        elif address and address.is_link_local:
            yield name, f"{text} counts on one network link only: take an address that other hosts reach", host
        elif str(address) == "255.255.255.255":
            yield name, f"{text} is no address of a host", host
        if site.of(host, "ictx_address"):
            seen[text].append(host)
    for text, hosts in seen.items():
        if len(hosts) > 1:
            yield "ictx_address", f"{' and '.join(hosts)} have the same address, {text}", ""


def names(site: Any) -> Iterator[Problem]:
    """Names of hosts are unique, whatever their capitals, and no group has the same one."""
    hosts = site.hosts("all")
    for name, count in Counter(str(host).lower() for host in hosts).items():
        if count > 1:
            first, second = [host for host in hosts if host.lower() == name][:2]
            text = f"differs from {first} in capitals only, which DNS ignores: rename one"
            yield f"host {second}", text, ""
    for host in hosts:
        if host in site.groups:
            yield f"host {host}", "has the name of a group, so that Ansible's patterns mean both: rename it", ""
        if host == "localhost":
            text = "is left out by the plays: give it the machine's name, with ansible_connection: local"
            yield "host localhost", text, ""
        if any(label[:1] in ("-", "") or label[-1:] == "-" for label in host.split(".")):
            yield f"host {host}", "has a part that is empty, or begins or ends with '-': rename it", ""
    local = [host for host in hosts if site.of(host, "ansible_connection") == "local"]
    if len(local) > 1:
        text = f"{' and '.join(local)} are all this machine (ansible_connection: local): leave one"
        yield "ansible_connection", text, ""


def groups(site: Any) -> Iterator[Problem]:
    """A host has one part in Kubernetes; agents have servers; no group looks like one of ours that is empty."""
    servers, agents = site.hosts("k3s_server"), site.hosts("k3s_agent")
    for host in agents:
        if host in servers:
            yield f"host {host}", "is in k3s_server and in k3s_agent: take it out of one", ""
    if agents and not servers and "k3s_server" in site.groups:
        yield "group k3s_agent", f"has {agents[0]}, but k3s_server no host that it could join: add one, or empty it", ""
    if site.get("kubernetes_distribution") == "debian" and servers and "lab_nodes" not in site.groups:
        yield "kubernetes_distribution", "debian is for the lab only: take k3s", ""
    ours = [name for name in OURS if name in site.groups]
    for name in site.groups:
        near = get_close_matches(name, ours, n=1, cutoff=0.9)
        if near and name not in ours and site.hosts(name) and not set(site.hosts(name)) <= set(site.hosts(near[0])):
            yield f"group {name}", f"has no effect, and hosts that {near[0]} has not: is it {near[0]}, misspelt?", ""
    if site.get("storage_type") == "nfs" and not site.hosts("storage_server"):
        yield "storage_type", "nfs needs a host in the group storage_server: add one, or set external", ""
    if site.get("storage_type") == "external" and site.hosts("storage_server"):
        text = f"has {site.hosts('storage_server')[0]}, which storage_type: external does not use: empty it, or set nfs"
        yield "group storage_server", text, ""


OURS = (
    *("alertmanager", "gpu", "grafana", "image_builder", "k3s_agent", "k3s_server", "prometheus", "registry", "slurm"),
    *("slurm_compute", "slurm_controller", "slurm_database", "slurm_login", "storage_client", "storage_server"),
)


def people(site: Any) -> Iterator[Problem]:
    """Keys are public keys of SSH as a whole, and Ansible's own account stays."""
    for user in site.get("ictx_users", []):
        for number, key in enumerate(user.get("ssh_keys") or [], 1):
            if text := _key_problem(str(key)):
                yield "ictx_users", f"{user['name']}: key {number} of ssh_keys {text}", ""
        if user.get("state") == "absent" and user["name"] in {
            site.of(host, "ansible_user") for host in site.hosts("all")
        }:
            yield "ictx_users", f"{user['name']} is absent, but Ansible logs in as this account (ansible_user)", ""


def _key_problem(key: str) -> str:
    if "PRIVATE KEY" in key:
        return "is a private key: take the public one, of the file .pub, and replace this one everywhere"
    found = KEY.fullmatch(key.strip())
    if not found:
        return "is no public key of SSH: write the line of the file .pub, as ssh-ed25519 AAAA…"
    try:
        data = base64.b64decode(found[2] or "", validate=True)
    except binascii.Error:
        data = b""
    parts, rest = [], data
    while len(rest) >= 4 and len(rest) >= 4 + int.from_bytes(rest[:4], "big"):
        size = int.from_bytes(rest[:4], "big")
        parts.append(rest[4 : 4 + size])
        rest = rest[4 + size :]
    whole = not rest and len(parts) > 1 and parts[0].decode(errors="replace") == found[1]
    return "" if whole else f"is not a whole key ({found[1]}): copy the line of the file .pub again"


def ports(site: Any) -> Iterator[Problem]:
    """Services do not listen where others of their host do, nor where nobody reaches them."""
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
                yield name, f"{value}: {what} listens on port {found[2]} there: take another", host
            if 30000 <= int(found[2]) <= 32767 and host in (*site.hosts("k3s_server"), *site.hosts("k3s_agent")):
                yield name, f"{value}: Kubernetes gives the ports 30000 to 32767 to its Services: take another", host
            at_home = (found[1] or "").startswith("127.") or found[1] in ("localhost", "[::1]")
            if at_home and name.removesuffix("_listen") in REACHED:
                yield name, f"{value}: Prometheus reaches it by the host's address: leave the address out", host
            local[found[2]].append(name)
            homes = [other for other in local[found[2]] if str(site.of(host, other, "")).startswith("127.")]
            if len(local[found[2]]) > 1 and homes:
                yield name, f"{local[found[2]][0]} listens on port {found[2]} too", host


RULES: tuple[Callable[[Any], Iterator[Problem]], ...] = (addresses, names, groups, people, ports)


def host_rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return RULES


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"host_rules": host_rules}
