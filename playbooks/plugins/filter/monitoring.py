"""Ansible filters: scrape targets of hosts, and password hashes for Prometheus' web configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import bcrypt
import yaml
from ansible.errors import AnsibleFilterError
from ansible.plugins.loader import filter_loader

# The variable with a service's listen address and port, by its default port.
LISTEN = {
    9090: "prometheus_listen",
    9093: "alertmanager_listen",
    9100: "node_exporter_listen",
    9104: "mysqld_exporter_listen",
    9115: "blackbox_exporter_listen",
    9400: "dcgm_exporter_listen",
}


def web_password(password: str, salt: str) -> str:
    """Returns the bcrypt hash of a password, the same each time for the same salt (21 letters or digits)."""
    if len(salt) != 21 or not salt.isascii() or not salt.isalnum():
        raise AnsibleFilterError("web_password: the salt must be 21 letters or digits")
    # Only two bits of a salt's 22nd character count; `.` sets them to 0.
    return bcrypt.hashpw(password.encode(), f"$2b$10${salt}.".encode()).decode()


def web_users(passwords: Mapping[str, str], salt: str, host: str) -> dict[str, str]:
    """Returns the hash of each user's password, with a salt that is unique to host and user."""
    return {
        user: web_password(password, hashlib.sha256(f"{salt}/{host}/{user}".encode()).hexdigest()[:21])
        for user, password in passwords.items()
    }


def scrape_targets(hosts: Iterable[str], hostvars: Mapping[str, Any], port: int, cluster: str) -> list[dict[str, Any]]:
    """Returns the targets of a service on some hosts, each labelled with its host's name in the inventory.

    `port` is the service's default; a host's setting in the inventory (LISTEN) overrides it.
    """
    address_of, in_url = (filter_loader.get(name).j2_function for name in ("host_address", "in_url"))

    def port_of(host: str) -> str:
        return str(hostvars[host].get(LISTEN.get(port, "")) or port).rpartition(":")[2]

    return [
        {
            "address": f"{in_url(address_of(host, hostvars))}:{port_of(host)}",
            "labels": {"node": str(host), "cluster": cluster},
        }
        for host in sorted(hosts)
    ]


def hosts_with_gpus(hosts: Iterable[str], hostvars: Mapping[str, Any], targets: str) -> list[str]:
    """Returns the hosts whose GPUs are scraped.

    A host that this run did not inspect (unreachable, or excluded by --limit) stays as it is in the existing file of
    targets.
    """
    before = {entry["labels"]["node"] for entry in yaml.safe_load(targets) or []}
    return [host for host in hosts if hostvars[host].get("dcgm_exporter_present", host in before)]


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns them by name."""
        return {
            "hosts_with_gpus": hosts_with_gpus,
            "scrape_targets": scrape_targets,
            "web_password": web_password,
            "web_users": web_users,
        }
