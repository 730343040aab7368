"""The programs of the role kube_lab: DNS records, volumes, certificates."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT
from programs import loaded

FILES = ROOT / "roles/kube_lab/files"


@pytest.fixture(scope="module")
def addons() -> Any:
    """Returns the program kube-lab-addons as a module."""
    return loaded(FILES / "kube-lab-addons")


def service(name: str, address: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "ns"}, "spec": {"clusterIP": address}}


def test_a_service_has_its_own_address_and_a_headless_one_those_of_its_pods(addons: Any) -> None:
    services = [service("web", "10.96.0.7"), service("db", "None"), {**service("else", ""), "spec": {}}]
    addresses = [{"ip": "10.244.0.3", "hostname": "db-0"}, {"ip": "10.244.0.4"}]
    endpoints = [
        {
            "metadata": {"name": "db", "namespace": "ns"},
            "subsets": [{"addresses": addresses}, {"notReadyAddresses": []}],
        },
        {"metadata": {"name": "web", "namespace": "ns"}, "subsets": [{"addresses": [{"ip": "10.244.0.5"}]}]},
        {"metadata": {"name": "db", "namespace": "other"}, "subsets": None},
    ]
    assert addons.names(services, endpoints).splitlines() == [
        "10.244.0.3 db-0.db.ns.svc.cluster.local",
        "10.244.0.3 db.ns.svc.cluster.local",
        "10.244.0.4 db.ns.svc.cluster.local",
        "10.96.0.7 web.ns.svc.cluster.local",
    ]


def claim(uid: str, **spec: str) -> dict[str, Any]:
    """Returns a claim of the class `fast`, whose pod is scheduled to the node `here`."""
    return {
        "metadata": {
            "name": "data",
            "namespace": "ns",
            "uid": uid,
            "annotations": {"volume.kubernetes.io/selected-node": "here"},
        },
        "spec": {
            "storageClassName": "fast",
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "5Gi"}},
            **spec,
        },
    }


def test_a_volume_is_made_for_each_claim_that_waits_for_one(addons: Any) -> None:
    unscheduled = claim("3")
    del unscheduled["metadata"]["annotations"]
    claims = [claim("1"), claim("2"), unscheduled, claim("4", storageClassName="slow"), claim("5", volumeName="pvc-5")]
    (made,) = addons.wanted_volumes(claims, {"pvc-2"}, "fast", "here", Path("/srv/pv"))
    assert made["metadata"]["name"] == "pvc-1"
    assert made["spec"]["local"] == {"path": "/srv/pv/pvc-1"}
    assert made["spec"]["capacity"] == {"storage": "5Gi"}
    assert made["spec"]["claimRef"]["uid"] == "1"


def test_only_released_volumes_of_our_own_are_removed(addons: Any) -> None:
    def volume(
        name: str, phase: str = "Released", policy: str = "Delete", by: str = addons.PROVISIONER
    ) -> dict[str, Any]:
        return {
            "metadata": {"name": name, "annotations": {"pv.kubernetes.io/provisioned-by": by}},
            "spec": {"persistentVolumeReclaimPolicy": policy, "local": {"path": f"/srv/pv/{name}"}},
            "status": {"phase": phase},
        }

    elsewhere = volume("elsewhere")
    elsewhere["spec"]["local"]["path"] = "/etc"
    volumes = [
        volume("gone"),
        volume("used", "Bound"),
        volume("kept", policy="Retain"),
        volume("other", by="x"),
        elsewhere,
    ]
    assert addons.unwanted_volumes(volumes, Path("/srv/pv")) == [("gone", Path("/srv/pv/gone"))]


def pki(folder: Path, *arguments: str) -> list[str]:
    """Runs kube-lab-pki and returns the certificates that it reports as created."""
    done = subprocess.run(
        [FILES / "kube-lab-pki", *arguments],
        env={**os.environ, "KUBE_LAB_PKI": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_certificates_are_made_once_and_anew_only_for_another_address(tmp_path: Path) -> None:
    node = ("kube1", "192.0.2.41", "10.96.0.1")
    planned = pki(tmp_path, "--check", *node)
    assert list(tmp_path.iterdir()) == []
    assert pki(tmp_path, *node) == planned
    assert {"ca.crt", "apiserver.crt", "admin.conf", "accounts.key"} <= set(planned)
    assert [path.name for path in tmp_path.iterdir() if path.stat().st_mode & 0o077] == []
    assert pki(tmp_path, *node) == []
    again = pki(tmp_path, "kube1", "192.0.2.42", "10.96.0.1")
    assert {"apiserver.crt", "kubelet.crt", "admin.conf"} <= set(again)
    assert not {"ca.crt", "accounts.key", "scheduler.crt"} & set(again)
    text = subprocess.run(
        ["openssl", "x509", "-in", tmp_path / "apiserver.crt", "-noout", "-ext", "subjectAltName"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "IP Address:192.0.2.42" in text
    assert "192.0.2.41" not in text
    assert "DNS:kubernetes.default.svc" in text
