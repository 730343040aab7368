"""slurm.conf, gres.conf and Prometheus' targets depend on the inventory, not on which nodes are reachable."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT, Cluster
from programs import loaded

HARDWARE = loaded(ROOT / "playbooks/plugins/filter/node_hardware.py")
HOSTLISTS = loaded(ROOT / "playbooks/plugins/filter/hostlists.py")
A100 = {"name": "gpu", "type": "a100", "count": 4, "file": "/dev/nvidia[0-3]"}


def report(cpus: int, sockets: int, cores: int, threads: int, memory: int) -> dict[str, Any]:
    """Returns the registered result of `slurmd -C`."""
    shape = f"Boards=1 SocketsPerBoard={sockets} CoresPerSocket={cores} ThreadsPerCore={threads}"
    return {"stdout": f"NodeName=x CPUs={cpus} {shape} RealMemory={memory}\nUpTime=0-00:00:01"}


def kinds(hosts: dict[str, dict[str, Any]], **given: Any) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Returns the kinds of nodes by their hostlists, and the unknown nodes."""
    options = {"groups": [], "measured": [], "conf": "", "reserved_mb": 2048} | given
    found = HARDWARE.compute_nodes(list(hosts), hosts, **options)
    return {kind["nodes"]: kind for kind in found["kinds"]}, found["unknown"]


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["gpu1"], "gpu1"),
        (["n8", "n9", "n10", "n12"], "n[8-10,12]"),
        (["n08", "n09", "n10"], "n[08-10]"),
        (["n009", "n09", "n10"], "n[009,09-10]"),
        (["a1", "b1", "a2"], "a1,b1,a2"),
        (["ctl", "ctl2"], "ctl,ctl2"),
        (["a", "b"], "a,b"),
        (["192.0.2.23", "192.0.2.24", "192.0.2.21"], "192.0.2.[23-24,21]"),
        (["gpu1.example.org", "gpu2.example.org"], "gpu1.example.org,gpu2.example.org"),
    ],
)
def test_a_hostlist_is_short_and_keeps_the_order(names: list[str], text: str) -> None:
    assert HOSTLISTS.compress_nodes(names) == text
    assert HOSTLISTS.expand_nodes(text) == names


@pytest.mark.parametrize(
    ("reported", "topology", "memory"),
    [
        # Eight cores with two threads and eight with one: 24 CPUs are not a multiple of 16 cores.
        (report(24, 1, 16, 2, 64000), "CPUs=24", 61952),
        (report(72, 1, 72, 1, 490000), "Sockets=1 CoresPerSocket=72 ThreadsPerCore=1", 487952),
        (report(2, 1, 2, 1, 1970), "Sockets=1 CoresPerSocket=2 ThreadsPerCore=1", 1970),
    ],
)
def test_a_node_that_is_not_declared_is_what_slurmd_reports(
    reported: dict[str, Any], topology: str, memory: int
) -> None:
    found, unknown = kinds({"n1": {"_slurm_reported": reported}})
    assert (found["n1"]["topology"], found["n1"]["memory_mb"], unknown) == (topology, memory, [])


def test_the_inventory_stands_above_what_was_measured_and_what_a_node_reports() -> None:
    other = report(2, 1, 2, 1, 1970)
    hosts = {f"gpu{n}": {"_slurm_reported": other} for n in (1, 2, 3, 10)}
    hosts["gpu2"]["slurm_gres"] = [A100]
    shape = {"sockets": 2, "cores_per_socket": 32, "threads_per_core": 2, "memory_mb": 512000}
    measured = [{"nodes": "gpu[1-3]", **shape, "gres": [{**A100, "type": "h100"}]}]
    groups = [
        {"name": "few", "nodes": ["gpu3"], "features": ["nvme"], "weight": 5, "gres": []},
        {"name": "one", "nodes": "gpu10", "cpus": 24, "memory_mb": 64000},
    ]
    found, _ = kinds(hosts, measured=measured, groups=groups)
    assert [(name, kind["topology"]) for name, kind in found.items()] == [
        ("gpu1", "Sockets=2 CoresPerSocket=32 ThreadsPerCore=2"),
        ("gpu2", "Sockets=2 CoresPerSocket=32 ThreadsPerCore=2"),
        ("gpu3", "Sockets=2 CoresPerSocket=32 ThreadsPerCore=2"),
        ("gpu10", "CPUs=24"),
    ]
    types = {name: [gres["type"] for gres in kind["gres"]] for name, kind in found.items()}
    assert types == {"gpu1": ["h100"], "gpu2": ["a100"], "gpu3": [], "gpu10": []}
    assert (found["gpu3"]["features"], found["gpu3"]["weight"]) == (["nvme"], 5)


def test_a_node_that_does_not_answer_stays_as_slurm_conf_has_it() -> None:
    line = (
        "NodeName=gpu[1-2] Sockets=2 CoresPerSocket=8 ThreadsPerCore=2 RealMemory=60000 Gres=gpu:a100:4 State=UNKNOWN"
    )
    hosts = {"gpu1": {"_slurm_reported": report(32, 2, 8, 2, 62048)}, "gpu2": {}, "gpu3": {}}
    found, unknown = kinds(hosts, conf=f"ClusterName=x\n{line}\n")
    assert list(found) == ["gpu[1-2]"], "the reserved memory is subtracted only once"
    assert unknown == ["gpu3"]
    assert HARDWARE.partition_nodes(["gpu[1-3]"], unknown) == "gpu[1-2]"
    assert HARDWARE.partition_nodes("ALL", unknown) == "ALL"


@pytest.mark.attack(
    "M2",
    "root of a compute node reports a hardware number followed by a line end and `SlurmUser=root`",
    before="the next run wrote the line into the controllers' slurm.conf",
    now="values reported by nodes are converted to numbers",
)
def test_what_a_node_reports_is_a_number() -> None:
    reported = report(128, 2, 32, 2, 515842)
    for number in ("128", "32", "515842"):
        text = reported["stdout"].replace(number, f"{number}\nSlurmUser=root")
        found, _ = kinds({"n1": {"_slurm_reported": {"stdout": text}}})
        assert "root" not in str(found)


def test_measured_nodes_are_merged_and_the_second_time_is_as_the_first() -> None:
    gpus = "\n".join(f"{n}, NVIDIA A100-SXM4-80GB" for n in range(4))
    hosts: dict[str, Any] = {
        f"gpu{n}": {"_measure_slurmd": report(128, 2, 32, 2, 515842 + n), "_measure_gpus": {"stdout": gpus}}
        for n in (1, 2)
    }
    hosts |= {"gpu3": {}, "gpu4": {"_measure_slurmd": {"failed": True}}}
    before = [{"nodes": "gpu[3-4,9]", "cpus": 4, "memory_mb": 8000}]
    text = HARDWARE.measured_nodes(before, list(hosts), hosts, ["gpu1", "gpu2", "gpu4"])
    entries = yaml.safe_load(text)["slurm_measured_nodes"]
    shape = {"sockets": 2, "cores_per_socket": 32, "threads_per_core": 2, "memory_mb": 515072}
    assert entries == [
        {"nodes": "gpu[1-2]", **shape, "gres": [A100]},
        {"nodes": "gpu[3-4]", "cpus": 4, "memory_mb": 8000},
    ], "gpu9 is no longer in the inventory"
    assert HARDWARE.measured_nodes(entries, list(hosts), hosts, ["gpu1"]) == text
    assert "\n  - nodes: gpu[1-2]\n" in text
    assert "\n    gres:\n      - name: gpu\n" in text, "yamllint of this repository requires indented lists"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("Unnamed", "unnamed"),
    ],
)
def test_a_gpu_has_the_short_name_of_its_model(name: str, kind: str) -> None:
    (gres,) = HARDWARE.gpu_resources(f"0, {name}\n1, {name}\n")
    assert gres == {"name": "gpu", "type": kind, "count": 2, "file": "/dev/nvidia[0-1]"}


@pytest.mark.parametrize("by_address", [False, True])
def test_a_thousand_nodes_of_four_kinds_are_ten_lines_in_ten_seconds(tmp_path: Path, by_address: bool) -> None:
    spread = {"a": (1, 400), "b": (401, 700), "c": (701, 950), "d": (951, 1000)}
    groups = [
        {
            "name": name,
            "nodes": f"n[{first}-{last}]",
            "sockets": 2,
            "cores_per_socket": 8 * number,
            "threads_per_core": 2,
            "memory_mb": 128000 * number,
            "gres": [A100] if name < "d" else [],
        }
        for number, (name, (first, last)) in enumerate(spread.items(), start=1)
    ]
    nodes = {
        f"n{n}": {"ansible_host": f"10.0.{n // 250}.{n % 250 + 1}"} if by_address else None for n in range(1, 1001)
    }
    groups_of_hosts = {"slurm_compute": {"hosts": nodes}, "gpu": {"children": {"slurm_compute": None}}}
    infra = {"infra1": {"ansible_host": "192.0.2.15"}}
    for name in yaml.safe_load((ROOT / "playbooks/plugins/inventory_schema.yml").read_text())["groups"]:
        groups_of_hosts.setdefault(name, {"hosts": infra} if name not in ("k3s_agent", "k3s_server") else {"hosts": {}})
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"all": {"children": groups_of_hosts}}))
    (tmp_path / "group_vars").mkdir()
    variables = {"ictx_cluster_name": "big", "ictx_state_dir": str(tmp_path), "slurm_node_groups": groups}
    variables |= {"ictx_shared_dir": "/shared", "ictx_registry": "infra1:5000", "ictx_users": []}
    (tmp_path / "group_vars/all.yml").write_text(yaml.safe_dump(variables))
    cluster = Cluster(tmp_path / "hosts.yml", facts=False)
    roles = {role.get_name(): (role, play) for role, play, _ in cluster.uses("site.yml")}

    def text(role: str, template: str, extra: dict[str, Any]) -> str:
        given = cluster.variables("infra1", roles[role][1], roles[role][0]) | extra
        return cluster.render(ROOT / "roles" / role / "templates" / template, given)

    start = time.process_time()
    conf, gres = (text("slurm", f"{name}.j2", {}) for name in ("slurm.conf", "gres.conf"))
    lines = re.findall(r"^NodeName=.*", conf, re.MULTILINE)
    assert len(lines) <= 10
    assert ("NodeAddr=" in conf) == by_address
    for line, (first, last) in zip(lines, spread.values(), strict=True):
        words = dict(word.split("=", 1) for word in line.split())
        assert HOSTLISTS.expand_nodes(words["NodeName"]) == [f"n{n}" for n in range(first, last + 1)]
        if by_address:
            expected = [nodes[f"n{n}"]["ansible_host"] for n in range(first, last + 1)]  # type: ignore[index]
            assert HOSTLISTS.expand_nodes(words["NodeAddr"]) == expected
    assert gres.count("NodeName=") == 3
    monitoring = ROOT / "playbooks/plugins/filter/monitoring.py"
    variables = cluster.variables("infra1", roles["prometheus"][1], roles["prometheus"][0])
    targets = loaded(monitoring).scrape_targets([*nodes], variables["hostvars"], 9100, "big")
    page = text("prometheus", "targets.yml.j2", {"item": {"name": "node", "targets": targets}})
    assert page.count("- targets:") == 1000
    assert time.process_time() - start < 10


def test_a_site_s_own_keys_stand_above_ours_and_null_leaves_one_out(tmp_path: Path) -> None:
    own = {"schedulertype": "sched/builtin", "MailProg": None, "LaunchParameters": ["a", "b"], "TopologyParam": "x=y"}
    extra = {"slurm_config": own, "slurm_cgroup_config": {"ConstrainSwapSpace": False, "CgroupPlugin": "cgroup/v2"}}
    cluster = Cluster(ROOT / "inventories/example", {"ictx_state_dir": str(tmp_path), **extra})
    role, play = next((role, play) for role, play, _ in cluster.uses("site.yml") if role.get_name() == "slurm")
    variables = cluster.variables("ctl1", play, role)
    conf, cgroup = (
        cluster.render(ROOT / f"roles/slurm/templates/{name}.conf.j2", variables).splitlines()
        for name in ("slurm", "cgroup")
    )
    assert "schedulertype=sched/builtin" in conf
    assert {"LaunchParameters=a,b", "TopologyParam=x=y", "SelectType=select/cons_tres"} <= set(conf)
    assert not [line for line in conf if line.startswith(("SchedulerType", "MailProg"))]
    assert conf.index("LaunchParameters=a,b") < next(n for n, line in enumerate(conf) if line.startswith("NodeName="))
    assert cgroup[1:] == [
        "ConstrainCores=yes",
        "ConstrainDevices=yes",
        "ConstrainRAMSpace=yes",
        "ConstrainSwapSpace=no",
        "CgroupPlugin=cgroup/v2",
    ]


LSCPU = """\
CPU(s):                16
Thread(s) per core:    2
Core(s) per socket:    8
Socket(s):             1
MemTotal:       65809408 kB
gpus 0
"""
UNDRIVEN = "".join(f"missing /dev/nvidia{n}\n" for n in range(4))
SHAPE = {"sockets": 1, "cores_per_socket": 8, "threads_per_core": 2}


@pytest.mark.parametrize(
    ("declared", "there", "problems"),
    [
        ({**SHAPE, "memory_mb": 64267}, LSCPU, []),
        ({**SHAPE, "memory_mb": 64268}, LSCPU, [("memory_mb", 64268, 64267)]),
        ({**SHAPE, "cores_per_socket": 9}, LSCPU, [("cores_per_socket", 9, 8)]),
        ({**SHAPE, "threads_per_core": 4}, LSCPU, [("threads_per_core", 4, 2)]),
        # The number of cores is equal, which SLURM accepts.
        ({**SHAPE, "sockets": 2, "cores_per_socket": 4}, LSCPU, []),
        ({"cpus": "17"}, LSCPU, [("cpus", 17, 16)]),
        ({"cpus": 16}, LSCPU, []),
        # slurmd's report takes precedence over lscpu's.
        ({"cpus": 16}, report(8, 1, 8, 1, 1000)["stdout"] + "\n" + LSCPU, [("cpus", 16, 8)]),
        (SHAPE, report(24, 1, 16, 2, 1000)["stdout"], []),
        ({**SHAPE, "sockets": 2}, report(24, 1, 16, 2, 1000)["stdout"], [(" * ".join(SHAPE), 32, 24)]),
        # A node that reports nothing is not compared.
        ({**SHAPE, "memory_mb": 10**9}, "", []),
        ({"gres": [A100]}, LSCPU, []),
        ({"gres": [A100]}, "missing /dev/nvidia3\n" + LSCPU, [("count of gpu:a100", 4, 3)]),
        # The driver is not installed yet.
        ({"gres": [A100]}, f"{UNDRIVEN}gpus 4\n", []),
        ({"gres": [A100]}, f"{UNDRIVEN}gpus 2\n", [("count of gpu:a100", 4, 2)]),
        ({"gres": [{"name": "gpu", "type": "fake", "count": 9}]}, LSCPU, []),
    ],
)  # fmt: skip
def test_what_is_declared_and_is_not_there(declared: dict[str, Any], there: str, problems: list[Any]) -> None:
    assert HARDWARE.hardware_problems(declared, there) == problems


def test_what_is_declared_of_a_node_counts_once() -> None:
    measured = {**SHAPE, "memory_mb": 1000, "gres": [A100]}
    own = {"slurm_gres": [], "slurm_real_memory_mb": 0}
    assert HARDWARE.declared_hardware(own, {"cpus": 4}, measured) == {
        "slurm_node_groups": {"cpus": 4},
        "slurm_measured_nodes": {"memory_mb": 1000, "gres": [A100]},
    }
    own = {"slurm_gres": [A100], "slurm_real_memory_mb": "900"}
    assert HARDWARE.declared_hardware(own, {"memory_mb": 800, "weight": 2}, measured) == {
        "slurm_real_memory_mb": {"memory_mb": 900},
        "slurm_node_groups": {"weight": 2},
        "slurm_gres": {"gres": [A100]},
        "slurm_measured_nodes": SHAPE,
    }
