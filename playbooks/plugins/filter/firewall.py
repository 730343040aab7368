"""Ansible filters: openings of a host's firewall, and their nftables rules."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible.plugins.loader import filter_loader

Opening = Mapping[str, Any]


def host_openings(
    ports: Sequence[Mapping[str, Any]], host: str, groups: Mapping[str, Sequence[str]], hostvars: Mapping[str, Any]
) -> list[Opening]:
    """Returns a host's openings, in the form of firewall_openings.

    Args:
        ports: playbooks/vars/ports.yml: `hosts` and `from` are groups; without `from` it is open to everyone.
        host: name of the host.
        groups: hosts by group.
        hostvars: variables of all hosts, for their addresses.
    """
    address = filter_loader.get("host_address").j2_function
    found = []
    for entry in ports:
        if host not in {name for group in entry["hosts"] for name in groups.get(group, ())}:
            continue
        opening = {key: entry[key] for key in ("what", "protocol", "ports") if key in entry}
        if "from" in entry:
            peers = dict.fromkeys(name for group in entry["from"] for name in groups.get(group, ()))
            others = [str(address(name, hostvars)) for name in peers if name not in (host, "localhost")]
            if not others:
                continue
            opening["from"] = others
        found.append(opening)
    return found


def _addresses(name: str) -> Iterator[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    try:
        yield ipaddress.ip_network(name, strict=False)
        return
    except ValueError:
        pass
    try:
        for answer in {answer[4][0] for answer in socket.getaddrinfo(name, None)}:
            yield ipaddress.ip_network(str(answer))
    except OSError as error:
        raise AnsibleFilterError(
            f"firewall: {name} has no address ({error}): set ansible_host or ictx_address"
        ) from error


def firewall_rules(openings: Sequence[Opening]) -> list[str]:
    """Returns rules of nftables: one for each opening and family of addresses."""
    rules = []
    for opening in openings:
        protocol, ports = opening.get("protocol", "tcp"), opening.get("ports")
        what = f'accept comment "{opening["what"]}"'
        match = f"{protocol} dport {{ {', '.join(map(str, ports))} }}" if ports else f"meta l4proto {protocol}"
        if "from" not in opening:
            rules.append(f"{match} {what}")
            continue
        networks = {network for name in opening["from"] for network in _addresses(name)}
        # nftables rejects sets with overlapping networks.
        old = ipaddress.collapse_addresses(one for one in networks if isinstance(one, ipaddress.IPv4Network))
        new = ipaddress.collapse_addresses(one for one in networks if isinstance(one, ipaddress.IPv6Network))
        for family, own in (("ip", map(str, old)), ("ip6", map(str, new))):
            if listed := ", ".join(one.removesuffix("/32" if family == "ip" else "/128") for one in own):
                rules.append(f"{family} saddr {{ {listed} }} {match} {what}")
    return rules


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"firewall_rules": firewall_rules, "host_openings": host_openings}
