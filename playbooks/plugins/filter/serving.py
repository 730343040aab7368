"""Ansible filters: validate releases of charts/serving (`ictx_serving_releases`) and build their values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ansible.utils.vars import merge_hash

Values = Mapping[str, Any]

MAIN, ALIAS = "ictx", "champion"
# Service `NAME-serving` has at most 52 characters, and the first one of a Service is a letter.
NAME = re.compile("[a-z]([a-z0-9-]{0,42}[a-z0-9])?")
DIGEST = re.compile("sha256:[0-9a-f]{64}")
# The chart's name in `helm list`: the role helm_release adds a hash of the content to the version.
PACKED = re.compile(r"serving-[^+]+\+[0-9a-f]{12}")
TAKEN = {"ictx": "the served model", "ictx-judge": "the judge", "ictx-mlflow": "MLflow"}
# Values of the main release that a canary does not inherit: names and addresses would conflict.
OF_THE_ADDRESS = ("canary", "fullnameOverride", "httpRoute", "ingress", "nameOverride", "router", "service", "tls")
ROUTER = {
    "podSelector": {
        "matchLabels": {"app.kubernetes.io/component": "router", "app.kubernetes.io/instance": MAIN},
    }
}
"""The NetworkPolicy peer that sends requests to further releases."""


def _service(name: str) -> str:
    """Returns the name of a release's Service in the chart."""
    return name if "serving" in name else f"{name}-serving"


def _served(model: Values) -> str:
    return str(model.get("servedName") or model.get("name") or "ictx-1b")


def present_releases(releases: Iterable[Values], main: Values) -> list[dict[str, Any]]:
    """Returns the releases that are present, complete.

    Args:
        releases: `ictx_serving_releases`.
        main: `ictx_serving_values`. One with a weight is a canary: it inherits these and their served name.
    """
    found = []
    for release in releases:
        if release.get("state", "present") == "absent":
            continue
        model, canary = main.get("model") or {}, release.get("weight") is not None
        base = {key: value for key, value in main.items() if key not in OF_THE_ADDRESS} if canary else {}
        own = {"model": {"servedName": _served(model)}} if canary else {}
        values = merge_hash(merge_hash(base, own), dict(release.get("values") or {}))
        values["model"] = {
            **values.get("model", {}),
            "name": release.get("model") or model.get("name") or "ictx-1b",
            "alias": release.get("alias") or ALIAS,
        }
        found.append({**release, "service": _service(release["name"]), "values": values})
    return found


def absent_releases(releases: Iterable[Values]) -> list[dict[str, Any]]:
    """Returns the releases to remove, each with its Service."""
    return [{**each, "service": _service(each["name"])} for each in releases if each.get("state") == "absent"]


def undeclared_releases(installed: Iterable[Values], releases: Iterable[Values]) -> list[str]:
    """Returns the names of releases that serving.yml installed and that are no longer in the inventory.

    Args:
        installed: what `helm list --output json` prints.
        releases: `ictx_serving_releases`.
    """
    known = {*TAKEN, *(release["name"] for release in releases)}
    return sorted(each["name"] for each in installed if PACKED.fullmatch(each["chart"]) and each["name"] not in known)


def released_versions(releases: Iterable[Values], answers: Iterable[Values]) -> list[dict[str, Any]]:
    """Returns the releases whose version is in the registry, with it as `found` (`answers`: one for each release)."""
    versions = [(answer.get("json") or {}).get("model_version") for answer in answers]
    return [{**release, "found": found} for release, found in zip(releases, versions, strict=True) if found is not None]


def release_values(release: Values, shared: Values, main: Values) -> dict[str, Any]:
    """Returns a release's values: shared ones, then its own, and access for the router of the address."""
    secret = {"existingSecret": f"{release['service']}-tls", "enabled": (main.get("tls") or {}).get("enabled", True)}
    values = merge_hash(dict(shared), {"service": {"type": "ClusterIP"}, "tls": secret})
    values = merge_hash(values, dict(release["values"]))
    policy = values.get("networkPolicy") or {}
    values["networkPolicy"] = {**policy, "allowFrom": [*policy.get("allowFrom", []), ROUTER]}
    tags = {tag["key"]: tag["value"] for tag in release["found"].get("tags") or []}
    digest = tags.get("ictx.image_digest", "")
    trained = {"trainingImageDigest": digest} if DIGEST.fullmatch(digest) else {}
    values["model"] = {**values["model"], "version": str(release["found"]["version"]), **trained}
    return values


def address_values(releases: Iterable[Values], main: Values) -> dict[str, Any]:
    """Returns the main release's values for routing requests to the others; none if there are no others."""
    values: dict[str, Any] = {}
    others = [{"service": release["service"]} for release in releases if release.get("weight") is None]
    if others:
        values["router"] = {"backends": [*(main.get("router") or {}).get("backends", []), *others]}
    for release in releases:
        if release.get("weight") is not None:
            values["canary"] = {"service": release["service"], "weight": release["weight"]}
    return values


def release_problems(releases: Iterable[Values], main: Values) -> list[str]:
    """Returns the problems in releases whose values have the right format, with remedies."""
    present = [release for release in releases if release.get("state", "present") == "present"]
    found = [f"{release['name']}: {text}" for release in releases for text in _name_problems(release["name"])]
    found += [f"{release['name']}: {text}" for release in present for text in _problems(release, main)]
    services = Counter(_service(release["name"]) for release in releases)
    found += [f"{count} items have the Service {name}: rename one" for name, count in services.items() if count > 1]
    canaries = [release["name"] for release in present if release.get("weight") is not None]
    if len(canaries) > 1:
        found.append(f"{' and '.join(canaries)} have a weight: requests are split between {MAIN} and one canary only")
    if canaries and (main.get("canary") or {}).get("service"):
        found.append(f"{canaries[0]} has a weight, and ictx_serving_values has canary.service: remove one of them")
    if len(canaries) < len(present) and str((main.get("router") or {}).get("enabled", "auto")).lower() == "false":
        found.append("needs the router, and router.enabled in ictx_serving_values is false: set it to auto")
    models = {MAIN: _served(main.get("model") or {})}
    for release in present_releases(present, main):
        name = _served(release["values"]["model"])
        same = next((other for other, served in models.items() if served == name), "")
        if release.get("weight") is None and same:
            found.append(f"{release['name']}: serves {name}, like {same}: set values.model.servedName")
        elif release.get("weight") is None:
            models[release["name"]] = name
        elif name != models[MAIN]:
            found.append(f"{release['name']}: has a weight, and serves {name} instead of {models[MAIN]}")
    return found


def _name_problems(name: str) -> Iterator[str]:
    if not NAME.fullmatch(name):
        yield "its name must be 1 to 44 lowercase letters, digits or '-', starting with a letter, not ending with '-'"
    for taken, what in TAKEN.items():
        if _service(name) == _service(taken) or name == taken:
            yield f"is the name of {what}: choose another"


def _problems(release: Values, main: Values) -> Iterator[str]:
    model, weight = main.get("model") or {}, release.get("weight")
    if release.get("version") is not None and release.get("alias"):
        yield "has both version and alias: remove one"
    for key in {"name", "alias", "version"} & (release.get("values") or {}).get("model", {}).keys():
        yield f"values.model.{key}: set {'model' if key == 'name' else key} of the release instead"
    for key in {"fullnameOverride", "nameOverride"} & (release.get("values") or {}).keys():
        yield f"values.{key}: the main release finds this one by its name: remove it"
    if weight is None:
        if not release.get("model"):
            yield "needs model, or a weight if it is a canary of the served model"
        return
    if not 0 <= int(weight) <= 100:
        yield f"weight is {weight}: must be from 0 to 100, its share in percent"
    alias = release.get("alias") or ALIAS
    same_model = release.get("model") in (None, model.get("name", "ictx-1b"))
    if release.get("version") is None and same_model and alias == model.get("alias", ALIAS):
        yield f"has a weight, and serves what {MAIN} serves (@{alias}): set version, or another alias"


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns them by name."""
        return {
            "absent_releases": absent_releases,
            "address_values": address_values,
            "present_releases": present_releases,
            "release_problems": release_problems,
            "release_values": release_values,
            "released_versions": released_versions,
            "undeclared_releases": undeclared_releases,
        }
