"""MIG devices: one line each in gres.conf, and their number in slurm.conf."""

from __future__ import annotations

from cluster import ROOT, Cluster

CAPS = "/dev/nvidia-caps/nvidia-cap"
FILES = [f"/dev/nvidia3,{CAPS}{number},{CAPS}{number + 1}" for number in (414, 423)]
GRES = [
    {"name": "gpu", "type": "a100", "count": 3, "file": "/dev/nvidia[0-2]"},
    {"name": "gpu", "type": "3g.20gb", "count": 2, "devices": FILES},
]


def test_each_device_of_mig_has_its_files() -> None:
    cluster = Cluster(ROOT / "inventories/example", {"ictx_state_dir": "/state", "slurm_gres": GRES})
    for role, play, hosts in cluster.uses("playbooks/slurm.yml"):
        if role.get_name() == "slurm":
            variables = cluster.variables(hosts[0], play, role)
            folder = ROOT / "roles/slurm/templates"
            gres, conf = (cluster.render(folder / f"{name}.conf.j2", variables) for name in ("gres", "slurm"))
            break
    lines = [line for line in gres.splitlines() if line.startswith("NodeName=")]
    assert lines == [
        "NodeName=gpu[1-4] Name=gpu Type=a100 File=/dev/nvidia[0-2]",
        *(f"NodeName=gpu[1-4] Name=gpu Type=3g.20gb MultipleFiles={files}" for files in FILES),
    ]
    assert " Gres=gpu:a100:3,gpu:3g.20gb:2" in conf
