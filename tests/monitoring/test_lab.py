"""The monitoring of the lab: who may read what, and what leaves it in a support bundle."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest
from lab import ROOT, STATE, Lab

pytestmark = pytest.mark.lab

PORTS = {
    "node_exporter": ("n1", 9100),
    "Prometheus": ("svc1", 9090),
    "Alertmanager": ("svc1", 9093),
    "MariaDB": ("ctl", 9104),
}
SECRETS = {
    path.name: path.read_bytes().decode(errors="ignore").strip()
    for path in (STATE / "secrets").glob("*")
    if path.name != "web_salt"
}


@pytest.fixture(scope="module")
def lab() -> Lab:
    """The lab that `make lab` left running."""
    assert (STATE / "ssh" / "config").exists(), f"no lab in {STATE}: run `make lab` first"
    return Lab()


@pytest.mark.parametrize("name", PORTS)
def test_nobody_reads_metrics_without_tls_and_a_password(lab: Lab, name: str) -> None:
    node, port = PORTS[name]
    ask = "curl --silent --output /dev/null --write-out '%{http_code}' --cacert /etc/ictx/tls/ca.crt"
    assert lab.run("svc1", f"{ask} https://{node}:{port}/metrics").stdout == "401"
    assert lab.run("svc1", f"{ask} --user metrics:wrong https://{node}:{port}/metrics").stdout == "401"
    assert lab.run("svc1", f"{ask} http://{node}:{port}/metrics").stdout == "400"


@pytest.mark.parametrize("node", ["ctl", "n1", "svc1"])
def test_no_secret_lies_in_a_file_that_everybody_may_read(lab: Lab, node: str) -> None:
    for name, value in SECRETS.items():
        found = lab.run(
            node, f"grep --recursive --fixed-strings --files-with-matches -e {value!r} /etc /var/lib/prometheus"
        )
        for path in found.stdout.splitlines():
            mode = int(lab.run(node, f"stat --format=%a {path}").stdout, 8)
            assert mode & 0o007 == 0, f"{name} in {path} of {node}, mode {mode:o}"


def test_a_support_bundle_has_every_node_and_no_secret(lab: Lab, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.tar.gz"
    done = subprocess.run(
        [ROOT / ".venv/bin/ansible-playbook", "playbooks/support-bundle.yml", "-e", f"support_bundle_file={bundle}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert bundle.stat().st_mode & 0o077 == 0
    with tarfile.open(bundle) as archive:
        texts = {member.name: archive.extractfile(member).read().decode() for member in archive if member.isfile()}
    assert {name.split("/")[0] for name in texts} >= {"ctl", "n1", "n2", "svc1"}
    assert "StoragePass=[" in texts["ctl/configuration.txt"]
    assert "slurmctld" in texts["ctl/services.txt"]
    assert len(texts["n1/journal.txt"]) > 1000
    for name, value in SECRETS.items():
        holders = [member for member, text in texts.items() if value in text]
        assert holders == [], f"{name} is in {holders}"
