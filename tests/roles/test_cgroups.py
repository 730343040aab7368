"""Settings that depend on the machine's cgroup version and on SLURM's process tracking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT, Cluster


def variables(cluster: Cluster, host: str, playbook: str, name: str) -> dict[str, Any]:
    """Returns the variables of a playbook's role on a host."""
    role, play = next((role, play) for role, play, _ in cluster.uses(playbook) if role.get_name() == name)
    return cluster.variables(host, play, role)


@pytest.mark.parametrize(("version", "expected"), [(1, {"SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE": "1"}), (2, {})])
def test_systemd_starts_in_the_lab_s_nodes_whatever_cgroups_the_machine_has(
    tmp_path: Path, version: int, expected: dict[str, str]
) -> None:
    extra = {"lab_state_dir": str(tmp_path), "_lab_host": {"quirks": {"cgroup_version": version}, "containers": {}}}
    cluster = Cluster(ROOT / "inventories/lab", extra)
    template = tmp_path / "environment.j2"
    template.write_text("{{ _lab_node_environment | to_json }}")
    assert json.loads(cluster.render(template, variables(cluster, "localhost", "playbooks/lab.yml", "lab"))) == expected


@pytest.mark.parametrize(
    ("tracking", "expected"),
    [
        (
            "cgroup",
            {
                "PrologFlags=Contain",
                "JobContainerType=job_container/tmpfs",
                "ProctrackType=proctrack/cgroup",
                "TaskPlugin=task/cgroup,task/affinity",
                "JobAcctGatherType=jobacct_gather/cgroup",
            },
        ),
        (
            "linuxproc",
            {
                "PrologFlags=Alloc",
                "JobContainerType=job_container/none",
                "ProctrackType=proctrack/linuxproc",
                "TaskPlugin=task/none",
                "JobAcctGatherType=jobacct_gather/linux",
            },
        ),
    ],
)
def test_cgroups_enforce_what_a_job_may_use_and_slurm_finds_out_their_version(
    tmp_path: Path, tracking: str, expected: set[str]
) -> None:
    cluster = Cluster(
        ROOT / "inventories/example", {"ictx_state_dir": str(tmp_path), "slurm_process_tracking": tracking}
    )
    known = variables(cluster, "ctl1", "site.yml", "slurm")
    conf, cgroup = (
        cluster.render(ROOT / f"roles/slurm/templates/{name}.conf.j2", known).splitlines()
        for name in ("slurm", "cgroup")
    )
    assert expected <= set(conf)
    # The plug-in is detected, so nodes with cgroup versions 1 and 2 have the same file.
    assert set(cgroup[1:]) == {f"Constrain{what}=yes" for what in ("Cores", "Devices", "RAMSpace", "SwapSpace")}
