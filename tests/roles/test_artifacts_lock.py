"""The lock of external artifacts is complete, and equal to the roles' defaults."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from ansible.template import Templar
from cluster import ROOT, Cluster, trusted

LOCK: dict[str, dict[str, Any]] = {
    entry["name"]: entry
    for entry in yaml.safe_load((ROOT / "playbooks/vars/artifacts.yml").read_text())["artifacts_lock"]
}


def defaults(role: str) -> dict[str, Any]:
    """Returns the defaults of a role."""
    return dict(yaml.safe_load((ROOT / f"roles/{role}/defaults/main.yml").read_text()))


def address(value: str, mirror: str = "") -> str:
    """Returns an address of a role's defaults, with or without a mirror."""
    found = re.fullmatch(r"\{\{ artifacts_mirror ~ '(.+)' if artifacts_mirror \| default\(''\) else '(.+)' \}\}", value)
    assert found, value
    return mirror + found[1] if mirror else found[2]


@pytest.mark.parametrize("entry", LOCK.values(), ids=list(LOCK))
def test_an_entry_tells_what_one_wants_to_know_of_it(entry: dict[str, Any]) -> None:
    assert entry["licence"]
    assert isinstance(entry["looked_at"], datetime.date)
    assert entry["end_of_life"] is None or isinstance(entry["end_of_life"], datetime.date)
    # The reason, if ours is not the newest.
    assert bool(entry["why"]) == (str(entry["newest"]) != str(entry["version"]))
    assert re.fullmatch("[0-9a-f]{64}", entry.get("sha256") or 64 * "0")


def test_names_and_paths_are_each_once() -> None:
    entries = yaml.safe_load((ROOT / "playbooks/vars/artifacts.yml").read_text())["artifacts_lock"]
    paths = [entry["path"] for entry in entries if entry["kind"] != "wheels"]
    assert len(set(paths)) == len(paths)
    assert len(LOCK) == len(entries)


def test_k3s_is_that_of_the_lock() -> None:
    role = defaults("k3s")
    for name, file in [("k3s", "k3s"), ("k3s-airgap-images", "k3s-airgap-images-amd64.tar.zst")]:
        entry = LOCK[name]
        assert entry["version"] == role["k3s_version"]
        assert entry["sha256"] == role["k3s_checksums"][role["k3s_version"]][file]
        below = f"/{role['k3s_version']}/{file}"
        assert unquote(entry["url"]) == address(role["k3s_mirror"]) + below
        assert f"M/{entry['path']}" == address(role["k3s_mirror"], "M") + below
    plugin = LOCK["nvidia-device-plugin"]
    assert role["k3s_device_plugin_image"].split("@")[0] == f"{plugin['url']}:{plugin['version']}"


def test_prometheus_is_that_of_the_lock() -> None:
    entry, role = LOCK["prometheus"], defaults("prometheus")
    assert entry["version"] == role["prometheus_version"]
    assert entry["sha256"] == role["prometheus_checksums"][role["prometheus_version"]]
    below = f"/v{entry['version']}/prometheus-{entry['version']}.linux-amd64.tar.gz"
    assert entry["url"] == address(role["prometheus_mirror"]) + below
    assert f"M/{entry['path']}" == address(role["prometheus_mirror"], "M") + below


def test_repositories_are_those_of_the_lock() -> None:
    grafana, role = LOCK["grafana"], defaults("grafana")
    assert grafana["packages"] == {"grafana": role["grafana_version"]}
    assert grafana["fingerprints"] == role["grafana_repository_fingerprints"]
    assert grafana["url"] == address(role["grafana_repository_url"])
    assert f"M/{grafana['path']}" == address(role["grafana_repository_url"], "M")

    toolkit, role = LOCK["nvidia-container-toolkit"], defaults("nvidia_container_toolkit")
    names = yaml.safe_load((ROOT / "roles/nvidia_container_toolkit/vars/main.yml").read_text())
    assert set(toolkit["packages"]) == set(names["_nvidia_container_toolkit_packages"])
    assert set(toolkit["packages"].values()) == {role["nvidia_container_toolkit_version"]}
    assert toolkit["fingerprints"] == role["nvidia_container_toolkit_repository_fingerprints"]
    base = role["nvidia_container_toolkit_repository_url"]
    assert toolkit["url"] == address(base) + "/stable/deb/amd64"
    assert f"M/{toolkit['path']}" == address(base, "M") + "/stable/deb/amd64"
    assert toolkit["key"] == address(base) + "/gpgkey"

    role = defaults("nvidia_driver")
    for release in ("debian12", "debian13", "ubuntu2404"):
        driver = LOCK[f"nvidia-driver-{release}"]
        assert driver["version"] == f"{role['nvidia_driver_branch']}.*"
        assert driver["fingerprints"] == role["nvidia_driver_repository_fingerprints"]
        assert driver["url"] == address(role["nvidia_driver_repository_url"]) + f"/{release}/x86_64"
        assert f"M/{driver['path']}" == address(role["nvidia_driver_repository_url"], "M") + f"/{release}/x86_64"
        # Its name has no branch, so the newest version would be one of another branch.
        assert driver["packages"]["nvidia-fabricmanager"] == driver["version"]
        exporter = set(defaults("dcgm_exporter")["dcgm_exporter_packages"])
        # Without it, DCGM has no profiling counters of Ampere and older GPUs.
        assert "datacenter-gpu-manager-4-proprietary" in exporter
        assert exporter <= set(driver["packages"])


def test_every_lock_file_of_images_is_mirrored() -> None:
    """For the Python of each accelerator: that of the inventory with images for it."""
    cluster = Cluster(ROOT / "inventories/lab")
    pythons = {"cpu": defaults("image_bake")["image_bake_python"]}
    example = yaml.safe_load((ROOT / "inventories/example/group_vars/all/images.yml").read_text())
    pythons[example["image_bake_accelerator"]] = example["image_bake_python"]
    schema = (ROOT / "playbooks/plugins/inventory_schema.yml").read_text()
    (choices,) = re.findall(r"ictx_training_lock:\n\s+type: str\n\s+choices: \[(.+)\]", schema)
    wanted = set()
    for role, play, hosts in cluster.uses("playbooks/images.yml"):
        if role.get_name() != "image_bake":
            continue
        for lock in choices.split(", "):
            variables = cluster.variables(hosts[0], play, role) | {"ictx_training_lock": lock}
            files = Templar(cluster.loader, variables=variables).template(trusted("{{ image_bake_requirements }}"))
            wanted |= {(file, python) for kind, python in pythons.items() for file in files[kind]}
    assert {(Path(e["version"]).name, e["python"]) for e in LOCK.values() if e["kind"] == "wheels"} == wanted


def test_no_default_of_a_role_names_a_host_that_the_lock_does_not() -> None:
    known = {urlsplit(entry["url"]).hostname or entry["url"].split("/")[0] for entry in LOCK.values()}
    found = set()
    for file in ROOT.glob("roles/*/defaults/main.yml"):
        values = "\n".join(line for line in file.read_text().splitlines() if not line.lstrip().startswith("#"))
        found |= {urlsplit(url).hostname for url in re.findall(r"https?://[^\s'\"}]+", values)}
    assert found - {"127.0.0.1", "localhost"} <= known
    assert len(found) >= 4
