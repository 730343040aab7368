"""Ansible filters: environment variables for the proxy, and the hosts that are reached without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ansible.plugins.loader import filter_loader

# Loopback addresses, and the domains of Kubernetes.
ALWAYS_DIRECT = ("localhost", "127.0.0.1", "::1", "[::1]", ".svc", ".cluster.local")
# Defaults of K3s, of the role k3s for servers with IPv6 addresses, and of the role kube_lab.
NETWORKS = {"cluster-cidr": "10.42.0.0/16", "service-cidr": "10.43.0.0/16"}
IPV6_NETWORKS = {"cluster-cidr": "fd42:42::/56", "service-cidr": "fd42:43::/112"}
LAB_NETWORKS = {"kube_lab_pod_network": "10.244.0.0/24", "kube_lab_service_network": "10.96.0.0/24"}


def proxy_environment(
    proxy: Mapping[str, Any],
    groups: Mapping[str, Sequence[str]],
    hostvars: Mapping[str, Any],
    without: Iterable[str] = (),
) -> dict[str, str]:
    """Returns the variables, in lower and in upper case, since programs differ; none without a proxy.

    Args:
        proxy: ictx_proxy.
        groups: hosts by group; each is reached without the proxy, by its name and its address.
        hostvars: variables of all hosts.
        without: hosts to leave out, which keeps the list short on clusters with a thousand nodes.
    """
    found = {f"{scheme}_proxy": str(proxy[scheme]) for scheme in ("http", "https") if proxy.get(scheme)}
    if not found:
        return {}
    found["no_proxy"] = ",".join(
        dict.fromkeys([*ALWAYS_DIRECT, *_internal(groups, hostvars, set(without)), *proxy.get("no_proxy", [])])
    )
    return found | {name.upper(): value for name, value in found.items()}


def _internal(groups: Mapping[str, Sequence[str]], hostvars: Mapping[str, Any], without: set[str]) -> Iterable[str]:
    address_of, in_url = (filter_loader.get(name).j2_function for name in ("host_address", "in_url"))
    for host in groups["all"]:
        if host not in without and host != "localhost":
            address = address_of(host, hostvars)
            # Python compares IPv6 addresses with brackets, other programs without.
            yield from (host, address, in_url(address))
    for host in groups.get("k3s_server", [])[:1]:
        own = hostvars[host]
        config = own.get("k3s_config") or {}
        networks = IPV6_NETWORKS if in_url(address := address_of(host, hostvars)) != address else NETWORKS
        yield from (text for key, default in networks.items() for text in str(config.get(key, default)).split(","))
        yield from (str(own.get(name, default)) for name, default in LAB_NETWORKS.items())
        yield from (form for name in filter(None, [own.get("k3s_api_address")]) for form in (name, in_url(name)))


def direct_hosts(environment: Mapping[str, str]) -> list[str]:
    """Returns the entries of no_proxy that apt supports: names and IPv4 addresses, no domains or networks."""
    listed = environment.get("no_proxy", "").split(",")
    return [entry for entry in listed if entry and not set(entry) & set(":/*") and not entry.startswith(".")]


def environment_lines(environment: Mapping[str, str]) -> str:
    """Returns the lines of a unit's section [Service] that set variables."""
    escaped = {name: value.replace("%", "%%").replace('"', '\\"') for name, value in environment.items()}
    return "".join(f'Environment="{name}={value}"\n' for name, value in sorted(escaped.items()))


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {
            "direct_hosts": direct_hosts,
            "environment_lines": environment_lines,
            "proxy_environment": proxy_environment,
        }
