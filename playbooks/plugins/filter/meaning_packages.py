"""Ansible filter: rules of preflight (meaning.py) about the versions of packages and releases."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any

Problem = tuple[str, str, str]

# Packages whose version is set by a variable of their role.
PINNED = {"grafana": "grafana_version", "nvidia-": "nvidia_driver_version"}


def pins(site: Any) -> Iterator[Problem]:
    """A package has one pin, and none if its role has a variable for the version."""
    for host in site.hosts("all"):
        given = [name for pin in site.of(host, "common_apt_pins") or [] for name in pin["packages"]]
        for name, count in Counter(given).items():
            if count > 1:
                yield "common_apt_pins", f"{name} has {count} pins, of which apt uses the first: keep one", host
            if own := next((variable for start, variable in PINNED.items() if name.startswith(start)), ""):
                yield "common_apt_pins", f"{name} is pinned by {own}: set that instead", host


def versions(site: Any) -> Iterator[Problem]:
    """A pinned driver is of the configured branch, and Prometheus' release has a checksum."""
    branch, version = (str(site.get(f"nvidia_driver_{part}") or "") for part in ("branch", "version"))
    if branch and version and version.split(".")[0] != branch:
        yield "nvidia_driver_version", f"{version} does not belong to nvidia_driver_branch {branch}", ""
    release, known = str(site.get("prometheus_version") or ""), site.get("prometheus_checksums") or {}
    if site.get("prometheus_source") == "upstream" and release and release not in known:
        text = f"{release} is not one of prometheus_checksums ({', '.join(known)}): add the SHA-256 of its archive"
        yield "prometheus_version", text, ""


def sources(site: Any) -> Iterator[Problem]:
    """Pins have packages, and versions of NVIDIA's driver need NVIDIA's repository."""
    if site.get("nvidia_driver_source") == "distribution" and site.get("nvidia_driver_version"):
        version = site.get("nvidia_driver_version")
        text = f"{version} needs nvidia_driver_source: nvidia; pin a package of the distribution in common_apt_pins"
        yield "nvidia_driver_version", text, ""
    if any(not pin["packages"] for pin in site.get("common_apt_pins") or []):
        yield "common_apt_pins", "an item has no packages: name some, or remove it", ""


def _minor(version: str) -> tuple[int, ...]:
    found = re.match(r"v?(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else ()


def kubernetes(site: Any) -> Iterator[Problem]:
    """The release has checksums, and networks are valid and the same on all servers."""
    servers, nodes = site.hosts("k3s_server"), [*site.hosts("k3s_server"), *site.hosts("k3s_agent")]
    for host in nodes:
        version, known = str(site.of(host, "k3s_version") or ""), site.of(host, "k3s_checksums") or {}
        if version and known and version not in known:
            near = get_close_matches(version, known, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ": add the SHA-256 of its files"
            yield "k3s_version", f"{version} is not one of k3s_checksums ({', '.join(known)}){hint}", host
    first = str(site.of(servers[0], "k3s_version") or "") if servers else ""
    for host in site.hosts("k3s_agent") if servers else ():
        version = str(site.of(host, "k3s_version") or "")
        if _minor(version) > _minor(first) > ():
            text = f"{version} is newer than the servers' ({first}), which Kubernetes does not support"
            yield "k3s_version", f"{text}: upgrade servers before agents", host
    for host in servers:
        config = site.of(host, "k3s_config") or {}
        ranges = {}
        for key, default in {"cluster-cidr": "10.42.0.0/16", "service-cidr": "10.43.0.0/16"}.items():
            found = [site.network(text.strip()) for text in str(config.get(key, default)).split(",")]
            ranges[key] = [network for network in found if network]
            if None in found or any(network.prefixlen == network.max_prefixlen for network in ranges[key]):
                yield f"k3s_config.{key}", f"{config[key]} is not a network: write it like {default}", host
            first = (site.of(servers[0], "k3s_config") or {}).get(key, default)
            if config.get(key, default) != first:
                text = f"{config.get(key, default)}, but {servers[0]} has {first}: set it for all servers"
                yield f"k3s_config.{key}", text, host
        for text in str(config.get("cluster-dns") or "").split(","):
            at = site.network(text.strip()) if text else None
            nets = ranges["service-cidr"]
            # IPv6 nodes have other default networks.
            set_here = "service-cidr" in config or ":" not in text
            inside = at and any(at.version == net.version and at.subnet_of(net) for net in nets)
            if text and set_here and not inside:
                yield "k3s_config.cluster-dns", f"{text} is not in service-cidr ({', '.join(map(str, nets))})", host


def rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return (pins, versions, sources, kubernetes)


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"meaning_packages": rules}
