"""Ansible filter: rules of preflight (meaning.py) about registries, MLflow, the served model and proxies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ansible.plugins.loader import filter_loader

Problem = tuple[str, str, str]

NODE_PORTS = range(30000, 32768)


def endpoints(site: Any) -> Iterator[Problem]:
    """The addresses of the registry and of Kubernetes' services match their settings."""
    registry, hosts = str(site.get("ictx_registry", "")), site.hosts("registry")
    name, _, port = registry.rpartition(":")
    if hosts and registry:
        right = str(site.of(hosts[0], "registry_port", 5000))
        if not name or port != right:
            yield "ictx_registry", f"{registry} must end with the port {right} (registry_port)", ""
        names = [hosts[0], site.address(hosts[0]), *(site.of(hosts[0], "registry_hosts") or [])]
        if name and name.strip("[]") not in names:
            text = f"{name} is not a name of {hosts[0]}, so that its certificate does not contain it"
            yield "ictx_registry", f"{text}: use one of {site.one_of(names)}, or add it to registry_hosts", ""
    ports: dict[int, str] = {}
    charts = {name: site.get(name) for name in ("ictx_mlflow_values", "ictx_serving_values", "ictx_judge_values")}
    for release in site.get("ictx_serving_releases") or []:
        charts[f"ictx_serving_releases: {release['name']}"] = release.get("values")
    for values, given in charts.items():
        service = (given or {}).get("service") or {}
        node_port = service.get("nodePort") if isinstance(service, Mapping) else None
        if service.get("type") != "NodePort" or not isinstance(node_port, int):
            continue
        if node_port not in NODE_PORTS:
            yield values, f"service.nodePort {node_port} must be from 30000 to 32767", ""
        if node_port in ports:
            yield values, f"service.nodePort {node_port} is also used by {ports[node_port]}", ""
        ports[node_port] = values
        uri = re.fullmatch(r"https?://[^/]+?(?::(\d+))?(?:/.*)?", str(site.get("ictx_mlflow_uri", "")))
        if values == "ictx_mlflow_values" and uri and uri[1] != str(node_port):
            yield "ictx_mlflow_uri", f"its port is {uri[1] or 'not set'}, but MLflow's nodePort is {node_port}", ""


def reached(site: Any) -> Iterator[Problem]:
    """Addresses that other hosts use are not loopback addresses; the registry is not a mirror of itself."""
    used = ("artifacts_mirror", "ictx_mlflow_uri", "ictx_registry")
    for name in used if len(site.hosts("all")) > 1 else ():
        address = str(site.get(name) or "")
        at = re.fullmatch(r"(?:https?://)?(localhost|127\.[0-9.]+|\[::1\])(?:[:/].*)?", address)
        if at and not (name == "ictx_registry" and site.hosts("registry")):
            yield name, f"{at[1]} means the local machine on every host: use a name or address that all hosts reach", ""
    registry = str(site.get("ictx_registry") or "")
    if registry and registry in (site.get("ictx_registry_mirror_of") or []):
        yield "ictx_registry_mirror_of", f"{registry} is ictx_registry itself: list others, such as docker.io", ""


def releases(site: Any) -> Iterator[Problem]:
    """Releases behind the address of the served model have unique names and models."""
    described = filter_loader.get("release_problems").j2_function
    if site.get("ictx_serving_releases") and site.groups.get("k3s_server") == []:
        text = "has no effect: the group k3s_server is empty: add a host, or remove this"
        yield "ictx_serving_releases", text, ""
    for text in described(site.get("ictx_serving_releases") or [], site.get("ictx_serving_values") or {}):
        yield "ictx_serving_releases", text, ""


def registries(site: Any) -> Iterator[Problem]:
    """There is one registry, the platform's or an external one, and its credentials exist."""
    hosts, other = site.hosts("registry"), site.get("ictx_registry_external")
    if hosts and other is not None:
        text = f"has no effect: {site.one_of(hosts)} in the group registry runs one: empty the group, or remove this"
        yield "ictx_registry_external", text, ""
    if "registry" in site.groups and not hosts and other is None:
        text = "has no host: add one, or set ictx_registry_external to the credentials of ictx_registry"
        yield "group registry", f"{text} ({{}} without any)", ""
    for prefix in ("", "push_"):
        user, password = ((other or {}).get(f"{prefix}{part}") for part in ("user", "password_file"))
        if bool(user) != bool(password):
            yield "ictx_registry_external", f"needs both {prefix}user and {prefix}password_file, or neither", ""
    for name in ("ca_file", "password_file", "push_password_file"):
        file = (other or {}).get(name)
        if file and not Path(file).is_file():
            yield "ictx_registry_external", f"{name} {file} is not on the control host: copy it there", ""


def sign_in(site: Any) -> Iterator[Problem]:
    """The OpenID provider of MLflow uses HTTPS, and its credentials exist."""
    oidc = site.get("ictx_mlflow_oidc")
    if oidc is None:
        return
    if not re.fullmatch(r"https://[^\s?#]+", str(oidc.get("issuer", ""))):
        yield "ictx_mlflow_oidc", f"issuer is {oidc.get('issuer')!r}: must be the provider's https:// URL", ""
    if not str(oidc.get("url") or site.get("ictx_mlflow_uri", "")).startswith("https://"):
        yield "ictx_mlflow_oidc", "sessions would be readable on the network: set url to https://", ""
    if not site.hosts("k3s_server"):
        yield "ictx_mlflow_oidc", "has no effect: the group k3s_server is empty, so there is no MLflow server", ""
    for name in ("client_secret_file", "ca_file"):
        file = oidc.get(name)
        if file and not Path(file).is_file():
            yield "ictx_mlflow_oidc", f"{name} {file} is not on the control host: copy it there", ""


def proxies(site: Any) -> Iterator[Problem]:
    """A proxy has an address and a port."""
    proxy = site.get("ictx_proxy")
    if proxy is not None and not (proxy.get("http") or proxy.get("https")):
        yield "ictx_proxy", "has neither http nor https: set one, such as {http: http://proxy.example.org:3128}", ""
    for scheme in ("http", "https"):
        address = str((proxy or {}).get(scheme) or "")
        if address and not re.fullmatch(r"https?://[^/]+:\d+/?", address):
            text = f"{scheme}: {address} has no port, and programs' defaults differ: add it, such as :3128"
            yield "ictx_proxy", text, ""


def rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return (endpoints, reached, releases, registries, sign_in, proxies)


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"meaning_services": rules}
