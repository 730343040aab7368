"""Ansible filters: addresses of hosts."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def host_address(host: str, hostvars: Mapping[str, Any]) -> str:
    """Returns the address (or name) under which other hosts reach this one.

    It is the host's `ictx_address`, else `ansible_host`, else its name in the inventory, which DNS must resolve then.
    """
    own = hostvars[host]
    return str(own.get("ictx_address") or own.get("ansible_host") or host)


def in_url(address: str) -> str:
    """Returns an address for a URL or before a port: IPv6 in brackets."""
    return f"[{address}]" if is_ip(address) and ":" in address else address


def is_ip(text: str) -> bool:
    """Returns whether the text is an address, not a name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def listen_address(nodes: Iterable[str], hostvars: Mapping[str, Any]) -> str:
    """Returns the address on which pods of Kubernetes nodes listen: their family is that of the nodes' addresses."""
    return "::" if any(":" in host_address(node, hostvars) for node in nodes) else "0.0.0.0"


def local_url_host(listen: str) -> str:
    """Returns the HOST:PORT at which the host itself reaches a service that listens on `[ADDRESS]:PORT`."""
    address, _, port = listen.rpartition(":")
    own = address.strip("[]")
    if is_ip(own):
        found = ipaddress.ip_address(own)
        own = "" if found.is_unspecified or found.is_loopback else own
    return listen if own else f"localhost:{port}"


def other_interface(address: str, facts: Mapping[str, Any]) -> str:
    """Returns the interface that has an address; empty if it is that of the default route for such addresses."""
    kind = "ipv6" if ":" in address else "ipv4"
    default = facts.get(f"default_{kind}", {}).get("interface")
    for name in facts.get("interfaces", []):
        about = facts.get(name.replace("-", "_").replace(".", "_").replace(":", "_"), {})
        found = [about.get("ipv4") or {}, *about.get("ipv4_secondaries", []), *about.get("ipv6", [])]
        if any(each.get("address") == address for each in found):
            return "" if about.get("device", name) == default else str(about.get("device", name))
    return ""


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {
            "host_address": host_address,
            "in_url": in_url,
            "is_ip": is_ip,
            "listen_address": listen_address,
            "local_url_host": local_url_host,
            "other_interface": other_interface,
        }
