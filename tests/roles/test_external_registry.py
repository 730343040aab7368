"""An external registry: clients get its authority and credentials, where it has them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.template import Templar
from cluster import ROOT, Cluster, trusted

REGISTRY = "harbor.example.org"


def rendered(tmp_path: Path, external: dict[str, str]) -> dict[str, Any]:
    """Returns the registry's settings of the builder and of a Kubernetes node."""
    for name in ("pull", "push"):
        (tmp_path / name).write_text(f"{name}-secret\n")
    (tmp_path / "ca.crt").touch()
    files = {name: str(tmp_path / value) if name.endswith("_file") else value for name, value in external.items()}
    hosts = yaml.safe_load((ROOT / "inventories/example/hosts.yml").read_text())
    hosts["all"]["children"]["image_builder"] = hosts["all"]["children"]["registry"]
    hosts["all"]["children"]["registry"] = None
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump(hosts))
    (tmp_path / "group_vars").symlink_to(ROOT / "inventories/example/group_vars")
    given = {"ictx_registry": REGISTRY, "ictx_registry_external": files, "ictx_state_dir": str(tmp_path)}
    cluster = Cluster(tmp_path / "hosts.yml", given)
    assert not cluster.hosts["registry"]

    found: dict[str, Any] = {}
    for role, play, named in cluster.uses("site.yml"):
        variables = cluster.variables(named[0], play, role) if named else {}
        templar = Templar(cluster.loader, variables=variables)
        if role.get_name() == "container_engine":
            found["docker"] = templar.template(trusted("{{ container_engine_registry_cas }}"))
        elif role.get_name() == "image_bake" and "logins" not in found:
            found["logins"] = templar.template(trusted("{{ _image_bake_logins }}"))
            found["ca"] = templar.template(trusted("{{ image_bake_registry_ca }}"))
        elif role.get_name() == "k3s":
            found["k3s"] = yaml.safe_load(cluster.render(ROOT / "roles/k3s/templates/registries.yaml.j2", variables))
    return found


def test_an_authority_and_users_of_its_own(tmp_path: Path) -> None:
    pulls = {"user": "robot$pull", "password_file": "pull", "ca_file": "ca.crt"}
    found = rendered(tmp_path, pulls | {"push_user": "robot$push", "push_password_file": "push"})
    assert found == {
        "docker": [{"address": REGISTRY, "ca_file": str(tmp_path / "ca.crt")}],
        "logins": {REGISTRY: {"auth": base64.b64encode(b"robot$push:push-secret").decode()}},
        "ca": str(tmp_path / "ca.crt"),
        "k3s": {
            "mirrors": {REGISTRY: {"endpoint": [f"https://{REGISTRY}"]}},
            "configs": {
                REGISTRY: {
                    "auth": {"username": "robot$pull", "password": "pull-secret"},
                    "tls": {"ca_file": f"/etc/rancher/k3s/registries/{REGISTRY}.crt"},
                }
            },
        },
    }


@pytest.mark.parametrize("user", [True, False])
def test_an_authority_that_everybody_trusts(tmp_path: Path, user: bool) -> None:
    found = rendered(tmp_path, {"user": "ictx", "password_file": "pull"} if user else {})
    assert found["docker"] == []
    assert found["ca"] == ""
    auth = {"username": "ictx", "password": "pull-secret"}
    assert found["k3s"]["configs"] == ({REGISTRY: {"auth": auth}} if user else None)
    assert found["logins"] == ({REGISTRY: {"auth": base64.b64encode(b"ictx:pull-secret").decode()}} if user else {})
