"""A site's settings of systemd units: on the hosts with these units, and none that systemd would ignore."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.template import Templar
from cluster import ROOT, Cluster, trusted
from programs import loaded

SYSTEMD = loaded(ROOT / "playbooks/plugins/filter/unit_dropins.py")
SCHEMA = yaml.safe_load((ROOT / "playbooks/plugins/inventory_schema.yml").read_text())
UNITS = yaml.safe_load((ROOT / "playbooks/vars/units.yml").read_text())["cluster_units"]
DROPINS = {
    "slurmd": {"Service": {"LimitNOFILE": 1048576}},
    "slurmctld": {
        "Unit": {"StartLimitIntervalSec": 0},
        "Service": {"Environment": ["A=1", "B=%H"], "ExecStartPre": None},
    },
    "ictx-slurm-metrics.timer": {"Timer": {"OnUnitActiveSec": ["", "1min"], "Persistent": False}},
}  # fmt: skip


def test_a_host_has_the_settings_of_the_units_that_run_there() -> None:
    cluster = Cluster(ROOT / "inventories/example", {"ictx_unit_dropins": DROPINS})
    role, play = next((r, p) for r, p, _ in cluster.uses("site.yml") if r.get_name() == "unit_dropins")
    found = {}
    for host in ("ctl2", "gpu1", "infra1"):
        templar = Templar(cluster.loader, variables=cluster.variables(host, play, role))
        found[host] = templar.template(trusted("{{ _unit_dropins_wanted }}"))
    folder = "/etc/systemd/system"
    assert found == {
        "ctl2": {
            f"{folder}/slurmctld.service.d/zz-site.conf": DROPINS["slurmctld"],
            f"{folder}/ictx-slurm-metrics.timer.d/zz-site.conf": DROPINS["ictx-slurm-metrics.timer"],
        },
        "gpu1": {f"{folder}/slurmd.service.d/zz-site.conf": DROPINS["slurmd"]},
        "infra1": {},
    }


def test_lists_are_lines_and_null_resets() -> None:
    assert SYSTEMD.unit_file(DROPINS["slurmctld"]) == (
        "[Unit]\nStartLimitIntervalSec=0\n[Service]\nEnvironment=A=1\nEnvironment=B=%H\nExecStartPre=\n"
    )
    assert SYSTEMD.unit_file(DROPINS["ictx-slurm-metrics.timer"]) == (
        "[Timer]\nOnUnitActiveSec=\nOnUnitActiveSec=1min\nPersistent=false\n"
    )


@pytest.mark.parametrize(
    ("unit", "sections", "ignored"),
    [
        *((SYSTEMD.whole_name(unit), sections, "") for unit, sections in DROPINS.items()),
        ("slurmd.service", {"Service": {"LimitNOFIL": 5}}, "LimitNOFIL"),
        ("slurmd.service", {"Service": {"MemoryMax": "lots"}}, "lots"),
        ("x.timer", {"Timer": {"OnCalendar": "someday"}}, "someday"),
    ],
)
def test_what_systemd_would_ignore_is_not_written(
    tmp_path: Path, unit: str, sections: dict[str, Any], ignored: str
) -> None:
    (write,) = (task for task in yaml.safe_load((ROOT / "roles/unit_dropins/tasks/main.yml").read_text())
                if task["name"] == "Install the settings of units")  # fmt: skip
    cluster = Cluster(ROOT / "inventories/lab")
    variables = {"item": f"/etc/systemd/system/{unit}.d/zz-site.conf"}
    command = Templar(cluster.loader, variables=variables).template(
        trusted(write["ansible.builtin.template"]["validate"])
    )
    file = tmp_path / "draft"
    file.write_text(SYSTEMD.unit_file(sections))
    # Ansible starts it without a shell of its own.
    done = subprocess.run(["python3", "-c", "import os, shlex, sys; a = shlex.split(sys.argv[1]); os.execvp(a[0], a)",
                           command % file], capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode == 0) == (not ignored), done.stdout + done.stderr
    assert ignored in done.stdout


def test_every_unit_that_a_role_runs_may_have_settings() -> None:
    """Except units of the lab's Kubernetes, and units that another unit starts and stops."""
    named = set()
    for file in ROOT.glob("roles/*/tasks/*.yml"):
        for line in (
            file.read_text().split("ansible.builtin.systemd_service:")[1:] if "kube_lab" not in str(file) else []
        ):
            name = next((text for text in line.splitlines() if text.strip().startswith("name:")), "")
            named.add(name.partition(":")[2].strip())
    fixed = {SYSTEMD.whole_name(name) for name in named if name and "{{" not in name}
    assert fixed >= {"slurmctld.service", "prometheus.service", "ictx-backup.timer"}
    # systemd-run creates this one for a minute.
    assert fixed - {"ictx-firewall-undo.timer"} <= UNITS.keys()
    groups = {group for listed in UNITS.values() for group in listed}
    assert groups <= {*SCHEMA["groups"], "all"}
