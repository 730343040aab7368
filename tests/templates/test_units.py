"""Our units are sandboxed: `systemd-analyze security` rates each at most 4.0, except those in EXCEPTIONS."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from ansible.errors import AnsibleFilterError
from cluster import ROOT, Cluster
from programs import loaded

FILTER = loaded(ROOT / "playbooks/plugins/filter/systemd.py")
MOST = 4.0
# Variables that a role's tasks register before they write a template.
REGISTERED = {"_k3s_runtime": {"stat": {"exists": True}}}
# The reason of each unit for its higher rating.
EXCEPTIONS = {
    "k3s/k3s.service": "starts containers with arbitrary rights",
    "slurm/slurmd.service.conf": "starts jobs as any user and with the node's devices",
    "kube_lab/kubelet.service": "starts containers, as K3s does; in the lab only",
    "kube_lab/kube-proxy.service": "writes the node's packet filter; in the lab only",
    "kube_lab/kube-lab-prepare.service": "changes the node's mounts for kubelet; in the lab only",
    "kube_lab/kube-lab-addons.service": "creates volumes for pods' users; in the lab only",
    "kube_lab/kube-lab-dns.service": "drops its own rights after its start; in the lab only",
}
# Settings in the packages' units that affect the rating; any other sandboxing of the packages is ignored.
PACKAGED = {
    "alertmanager": "User=prometheus",
    "blackbox_exporter": "User=prometheus",
    "dcgm_exporter": "User=root",
    "grafana": "User=grafana",
    "journal": "DynamicUser=yes",
    "kube_lab": "User=etcd",
    "mysqld_exporter": "User=prometheus",
    "node_exporter": "User=prometheus",
    "prometheus": "User=prometheus",
    "registry": "User=docker-registry",
    "slurm": "User=root",
}


def units() -> dict[str, Path]:
    """Returns the templates of units and of their drop-ins, by role and name."""
    found = [*ROOT.glob("roles/*/templates/*.service*.j2"), *ROOT.glob("roles/*/templates/*unit.conf.j2")]
    return {f"{path.parts[-3]}/{path.stem}": path for path in sorted(found)}


UNITS = units()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Returns each unit as rendered for the first host of its role, in each inventory."""
    state = str(tmp_path_factory.mktemp("state"))
    found: dict[str, list[str]] = {}
    for inventory in ("example", "lab"):
        cluster = Cluster(ROOT / "inventories" / inventory, {"ictx_state_dir": state, "lab_state_dir": state})
        for role, play, hosts in cluster.uses("site.yml"):
            mine = {name: path for name, path in UNITS.items() if name.split("/")[0] == role.get_name() and hosts}
            variables = {**cluster.variables(hosts[0], play, role), **REGISTERED} if mine else {}
            for name, path in mine.items():
                found.setdefault(name, []).append(cluster.render(path, variables))
    return found


def exposure(text: str, folder: Path) -> float:
    """Returns systemd's exposure rating of a unit, from 0 to 10."""
    file = folder / "test.service"
    file.write_text(text if re.search("^ExecStart=/", text, re.M) else text + "ExecStart=\nExecStart=/bin/true\n")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", file],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found, done.stderr
    return float(found[1])


@pytest.mark.attack(
    "L",
    "a service of the platform is compromised through its port or its input",
    before="units rated 8.5 to 8.9 in systemd-analyze security: nearly the whole host was accessible",
    now="each unit is rated 4.0 or better; tests/templates/test_units.py lists exceptions with reasons",
)
@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_shut_in_or_named_with_a_reason(name: str, texts: dict[str, list[str]], tmp_path: Path) -> None:
    assert texts[name]
    for text in texts[name]:
        role = name.split("/")[0]
        if "\nDescription=" not in text:
            text = f"[Service]\n{PACKAGED[role]}\n{text}"
        elif name in ("grafana/grafana-server.service", "prometheus/prometheus.service"):
            # The role's drop-in applies to the unit, whichever package provides it.
            text += texts[f"{role}/unit.conf"][0]
        rated = exposure(text, tmp_path)
        assert (rated > MOST) == (name in EXCEPTIONS), f"{name}: {rated}"


def test_every_exception_is_a_unit() -> None:
    assert set(EXCEPTIONS) <= set(UNITS)


def test_a_sandbox_has_differences_and_no_second_line() -> None:
    lines = FILTER.sandbox({"UMask": "0077", "ProtectHome": None, "ReadWritePaths": "/a"}).splitlines()
    assert "UMask=0077" in lines
    assert "ReadWritePaths=/a" in lines
    assert "ProtectSystem=strict" in lines
    assert not [line for line in lines if line.startswith("ProtectHome")]
    for wrong in ("/a\nExecStart=/bin/sh", True, ["/a"]):
        with pytest.raises(AnsibleFilterError):
            FILTER.sandbox({"ReadWritePaths": wrong})


def test_units_that_do_not_run_or_are_not_enabled_are_named() -> None:
    shown = (
        "Id=a.service\nActiveState=active\nUnitFileState=enabled\n\n"
        "Id=b.timer\nActiveState=failed\nUnitFileState=enabled\n\n"
        "Id=c.path\nActiveState=active\nUnitFileState=disabled\n\n"
        "Id=d.service\nActiveState=inactive\nUnitFileState="
    )
    assert FILTER.unready(["a.service", "b.timer", "c.path", "d.service"], shown) == ["b.timer", "c.path", "d.service"]
    assert FILTER.unready(["a.service"], shown.split("\n\n")[0]) == []
    with pytest.raises(AnsibleFilterError, match="2 units and 1 blocks"):
        FILTER.unready(["a.service", "b.timer"], shown.split("\n\n")[0])
