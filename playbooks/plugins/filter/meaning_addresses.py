"""Ansible filter: rules of preflight (meaning.py) about addresses and networks."""

from __future__ import annotations

import ipaddress
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

Problem = tuple[str, str, str]

K3S_NETWORKS = {"cluster-cidr": "10.42.0.0/16", "service-cidr": "10.43.0.0/16"}  # its defaults
LAB_NETWORKS = {"kube_lab_pod_network": "10.244.0.0/24", "kube_lab_service_network": "10.96.0.0/24"}  # the role's


def unique(site: Any) -> Iterator[Problem]:
    """Hosts have unique names and addresses, outside the networks of pods and Services."""
    seen: dict[tuple[str, str], list[str]] = defaultdict(list)
    for host in site.hosts("all"):
        if site.of(host, "ansible_connection") != "local":
            seen[site.address(host), str(site.of(host, "ansible_port", 22))].append(host)
        if re.fullmatch(r"[0-9.]+", host) and not site.network(host):
            yield f"host {host}", "is a number, which programs parse as an address: rename it", ""
        if any(len(label) > 63 for label in host.split(".")) or len(host) > 64:
            text = "has a name of more than 64 characters (63 a label), which no certificate can have"
            yield f"host {host}", text, ""
        right = host.lower().replace("_", "-")
        if host != right and host in site.hosts("k3s_server") + site.hosts("k3s_agent"):
            text = f"is a node of Kubernetes, whose name must have neither capitals nor '_': rename it {right}"
            yield f"host {host}", text, ""
        if (alone := site.network(site.address(host))) and (alone.is_multicast or alone.is_unspecified):
            yield "ansible_host", f"{site.address(host)} is not the address of a host", host
    for (address, _), hosts in seen.items():
        if len(hosts) > 1:
            yield "ansible_host", f"{' and '.join(hosts)} have the same address, {address}", ""
    networks = {name: site.network(text) for name, text in _networks(site)}
    for name, network in networks.items():
        if network is None:
            continue
        for host in site.hosts("all"):
            inside = site.network(site.address(host))
            if inside and inside.version == network.version and network.overlaps(inside):
                yield name, f"{network} has the address of {host} ({site.address(host)}): use another network", ""
        for other, second in networks.items():
            if other > name and second and second.version == network.version and network.overlaps(second):
                yield name, f"{network} overlaps {other} ({second})", ""


def _networks(site: Any) -> Iterator[tuple[str, str]]:
    if not site.hosts("k3s_server"):
        return
    distribution = site.get("kubernetes_distribution", "auto")
    if distribution in ("auto", "k3s"):
        config = site.get("k3s_config") or {}
        for key, default in K3S_NETWORKS.items():
            for text in str(config.get(key, default)).split(","):
                yield f"k3s_config.{key}", text.strip()
    if distribution != "k3s":
        for name, default in LAB_NETWORKS.items():
            yield name, str(site.get(name, default))


def addresses(site: Any) -> Iterator[Problem]:
    """Addresses are complete, belong to hosts, and are reachable from other hosts."""
    seen: dict[str, list[str]] = defaultdict(list)
    several = len(site.hosts("all")) > 1
    for host in site.hosts("all"):
        if site.of(host, "ansible_connection") == "local" and not site.of(host, "ictx_address"):
            continue
        name = "ictx_address" if site.of(host, "ictx_address") else "ansible_host"
        text = site.address(host)
        address = _ip(text)
        if address is None and text != host and re.fullmatch(r"[0-9.]+", text):
            yield name, f"{text} is not an address: write four numbers from 0 to 255 without leading zeros", host
        elif text == "localhost" or (address and address.is_loopback):
            if several:
                what = "means the local machine on every other host: set ictx_address to one that they reach"
                yield name, f"{text} {what}", host
        elif address and address.is_link_local:
            yield name, f"{text} is valid on one network link only: use an address that other hosts reach", host
        elif str(address) == "255.255.255.255":
            yield name, f"{text} is not the address of a host", host
        if site.of(host, "ictx_address"):
            seen[text].append(host)
    for text, hosts in seen.items():
        if len(hosts) > 1:
            yield "ictx_address", f"{' and '.join(hosts)} have the same address, {text}", ""


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def networks(site: Any) -> Iterator[Problem]:
    """Networks that have access are complete."""
    given = [("storage_nfs_clients", site.get("storage_nfs_clients") or [])]
    given += [("firewall_extra", entry.get("from") or []) for entry in site.get("firewall_extra") or []]
    for where, texts in given:
        for text in map(str, texts):
            looks = re.fullmatch(r"[0-9./]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(/\d+)?", text)
            if looks and not site.network(text):
                yield where, f"{text} is not an address or network: write it like 192.0.2.0/24 or fd00::/64", ""


def rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return (unique, addresses, networks)


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"meaning_addresses": rules}
