"""Ansible filter: rules of preflight (meaning.py) about the names of hosts, groups and people."""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any

Problem = tuple[str, str, str]

OURS = (
    *("alertmanager", "gpu", "grafana", "image_builder", "k3s_agent", "k3s_server", "prometheus", "registry", "slurm"),
    *("slurm_compute", "slurm_controller", "slurm_database", "slurm_login", "storage_client", "storage_server"),
)
KEY = re.compile(r"(?:^|.*[\s,\"])((?:ssh|ecdsa|sk-ssh|sk-ecdsa)-[a-z0-9@.-]+)(?: +(\S+).*)?$")


def names(site: Any) -> Iterator[Problem]:
    """Names of hosts are unique, ignoring case, and differ from groups' names."""
    hosts = site.hosts("all")
    for name, count in Counter(str(host).lower() for host in hosts).items():
        if count > 1:
            first, second = [host for host in hosts if host.lower() == name][:2]
            text = f"differs from {first} only in case, which DNS ignores: rename one"
            yield f"host {second}", text, ""
    for host in hosts:
        short = host.partition(".")[0]
        if short != host and short in hosts:
            text = f"is {short} with its domain, which is the same machine for SLURM and DNS: remove one of them"
            yield f"host {host}", text, ""
        if host in site.groups:
            yield f"host {host}", "has the same name as a group, so that Ansible's patterns match both: rename it", ""
        if host == "localhost":
            text = "is skipped by the plays: use the machine's name, with ansible_connection: local"
            yield "host localhost", text, ""
        if any(label[:1] in ("-", "") or label[-1:] == "-" for label in host.split(".")):
            yield f"host {host}", "has a part that is empty, or begins or ends with '-': rename it", ""
    local = [host for host in hosts if site.of(host, "ansible_connection") == "local"]
    if len(local) > 1:
        text = f"{' and '.join(local)} are all this machine (ansible_connection: local): keep one"
        yield "ansible_connection", text, ""


def groups(site: Any) -> Iterator[Problem]:
    """A host has one role in Kubernetes; agents have servers; no unused group looks like a misspelt one."""
    servers, agents = site.hosts("k3s_server"), site.hosts("k3s_agent")
    for host in agents:
        if host in servers:
            yield f"host {host}", "is in k3s_server and in k3s_agent: remove it from one", ""
    if agents and not servers and "k3s_server" in site.groups:
        yield "group k3s_agent", f"has {agents[0]}, but k3s_server has no host to join: add one, or empty k3s_agent", ""
    if site.get("kubernetes_distribution") == "debian" and servers and "lab_nodes" not in site.groups:
        yield "kubernetes_distribution", "debian is for the lab only: use k3s", ""
    ours = [name for name in OURS if name in site.groups]
    for name in site.groups:
        near = get_close_matches(name, ours, n=1, cutoff=0.9)
        if near and name not in ours and site.hosts(name) and not set(site.hosts(name)) <= set(site.hosts(near[0])):
            text = f"has no effect, and its hosts are not in {near[0]}: rename it, if it is a misspelling"
            yield f"group {name}", text, ""
    if site.get("storage_type") == "nfs" and not site.hosts("storage_server"):
        yield "storage_type", "nfs needs a host in the group storage_server: add one, or set external", ""
    if site.get("storage_type") == "external" and site.hosts("storage_server"):
        text = f"has {site.hosts('storage_server')[0]}, which storage_type: external does not use: empty it, or set nfs"
        yield "group storage_server", text, ""


def people(site: Any) -> Iterator[Problem]:
    """SSH keys are complete public keys, and Ansible's own account is not removed."""
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
        return "is a private key: use the public one from the .pub file, and replace the exposed key everywhere"
    found = KEY.fullmatch(key.strip())
    if not found:
        return "is not a public SSH key: copy the line of the .pub file, such as ssh-ed25519 AAAA…"
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
    return "" if whole else f"is an incomplete key ({found[1]}): copy the line of the .pub file again"


def rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return (names, groups, people)


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"meaning_hosts": rules}
