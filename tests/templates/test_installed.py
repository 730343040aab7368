"""Roles adapt to the installed release of SLURM, and keep other settings of Docker and other clusters' helm."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.template import Templar
from cluster import ROOT, Cluster, trusted
from programs import loaded

SERVICE = ROOT / "roles/nvidia_driver/tasks/service.yml"
HARDWARE = loaded(ROOT / "playbooks/plugins/filter/node_hardware.py")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a function: role, host, registered variables → templar."""
    cluster = Cluster(ROOT / "inventories/example", {"ictx_state_dir": str(tmp_path_factory.mktemp("state"))})
    uses = {role.get_name(): (role, play) for role, play, _ in cluster.uses("site.yml")}

    def templar(role: str, host: str, **registered: Any) -> Templar:
        variables = cluster.variables(host, uses[role][1], uses[role][0]) | registered
        return Templar(cluster.loader, variables=variables)

    return templar


def written(templar: Templar, role: str, template: str) -> str:
    """Returns the text of a role's template."""
    text = (ROOT / "roles" / role / "templates" / template).read_text()
    return str(templar.template(trusted(text), convert_data=False))


@pytest.mark.parametrize(
    ("package", "options"),
    [
        ("22.05.8-4+deb12u3", "-D -s"),
        ("23.11.4-1.2ubuntu5", "--systemd"),
        ("24.11.5-4", "--systemd"),
        ("1:25.05.1-1", "--systemd"),
    ],
)
def test_slurmd_is_started_as_its_release_reports_readiness(example: Any, package: str, options: str) -> None:
    text = written(example("slurm", "gpu1", _slurm_package={"stdout": package}), "slurm", "slurmd.service.conf.j2")
    assert f"\nExecStart=/usr/sbin/slurmd {options} -N gpu1 " in text


BEFORE = """
NodeName=gpu1 NodeAddr=192.0.2.21 Sockets=2 RealMemory=1000 Gres=gpu:a100:4 State=UNKNOWN
NodeName=gpu2 NodeAddr=192.0.2.22 Sockets=2 RealMemory=1000 Gres=gpu:a100:4 State=UNKNOWN
PartitionName=batch Nodes=ALL
"""
SAME = "NodeName=gpu[1-2] NodeAddr=192.0.2.[21-22] Sockets=2 RealMemory=1000 Gres=gpu:a100:4 State=UNKNOWN\n"


@pytest.mark.parametrize(
    ("conf", "differs"),
    [
        (SAME, False),
        (f"{SAME}PartitionName=other Nodes=ALL MaxTime=1\n", False),
        (SAME.replace("[1-2]", "[1-3]").replace("21-22", "21-23"), True),
        (SAME.replace("a100:4", "a100:8"), True),
        (SAME.replace("21-22", "22,21"), True),
    ],
)
def test_only_other_nodes_need_a_restart(conf: str, differs: bool) -> None:
    assert (HARDWARE.defined_nodes(BEFORE) != HARDWARE.defined_nodes(conf)) == differs


@pytest.mark.parametrize(
    ("package", "differ", "changed", "restart"),
    [
        ("22.05.8-4", True, False, True),
        ("22.05.8-4", False, True, True),
        ("22.05.8-4", False, False, False),
        ("24.11.5-4", True, True, False),
    ],
)
def test_daemons_restart_for_nodes_until_slurm_reads_them_anew(
    example: Any, package: str, differ: bool, changed: bool, restart: bool
) -> None:
    primary = {
        "_slurm_nodes_differ": differ,
        "_slurm_files": {"changes": ["/etc/slurm/cgroup.conf", *(["/etc/slurm/gres.conf"] if changed else [])]},
    }
    templar = example("slurm", "gpu1", _slurm_package={"stdout": package}, hostvars={"ctl1": primary})
    assert templar.template(trusted("{{ _slurm_nodes_changed }}")) is restart


@pytest.mark.parametrize(
    ("driver", "chosen"),
    [
        ("580.95.05-1", ["580.95.05-1"]),
        ("580.95.05-0ubuntu1", ["580.95.05-1"]),
        ("580.105.08-1", ["580.105.08-0ubuntu1"]),
        ("580.95.0-1", []),
        ("580.9-1", []),
    ],
)
def test_the_fabric_manager_has_exactly_the_driver_s_version(example: Any, driver: str, chosen: list[str]) -> None:
    lines = [f" nvidia-fabricmanager | {v} | http://x  Packages" for v in ("580.105.08-0ubuntu1", "580.95.05-1")]
    installed, listed = {"results": [{"stdout": driver}, {"stdout": ""}]}, {"stdout": "\n".join([*lines, lines[-1]])}
    role = example("nvidia_driver", "gpu1", _nvidia_driver_installed=installed, _nvidia_driver_fabrics=listed)
    assert role.template(trusted("{{ _nvidia_driver_fitting }}")) == chosen


@pytest.mark.parametrize(
    ("source", "branch", "package"),
    [
        ("nvidia", "570", "nvidia-fabricmanager-570"),
        ("nvidia", "580", "nvidia-fabricmanager"),
        ("nvidia", "590", "nvidia-fabricmanager"),
        ("distribution", "580", "nvidia-fabricmanager-580"),
    ],
)
def test_the_fabric_manager_is_named_as_in_the_repository(example: Any, source: str, branch: str, package: str) -> None:
    role = example("nvidia_driver", "gpu1", nvidia_driver_source=source, nvidia_driver_branch=branch)
    assert role.template(trusted("{{ _nvidia_driver_fabric_package }}")) == package


@pytest.mark.parametrize(
    ("policy", "switches", "nvlink5", "runs"),
    [
        ("auto", [], False, False),
        ("auto", ["0000:c4:00.0"], False, True),
        ("auto", [], True, True),
        ("never", [], True, False),
    ],
)
def test_the_fabric_manager_runs_where_switches_are(
    example: Any, policy: str, switches: list[str], nvlink5: bool, runs: bool
) -> None:
    pci = {"nvswitches": switches, "nvlink5": nvlink5}
    role = example("nvidia_driver", "gpu1", nvidia_driver_fabric_manager=policy, _nvidia_driver_pci=pci)
    assert role.template(trusted("{{ _nvidia_driver_with_fabric }}")) is runs


UBUNTU = "/usr/bin/nvidia-persistenced --user nvidia-persistenced"


@pytest.mark.parametrize(
    ("unit", "command"),
    [
        (
            f"Type=forking\nExecStart={UBUNTU} --no-persistence-mode --verbose\nExecStopPost=/bin/rm -rf x\n",
            f"ExecStart={UBUNTU} --persistence-mode --verbose",
        ),
        ("Type=forking\nExecStart=/usr/bin/nvidia-persistenced --user nvpd\n", ""),
    ],
)
def test_gpus_keep_their_state_between_processes(example: Any, unit: str, command: str) -> None:
    content = base64.b64encode(f"[Service]\n{unit}".encode()).decode()
    role = example("nvidia_driver", "gpu1", _nvidia_driver_unit={"content": content})
    assert role.template(trusted("{{ _nvidia_driver_persistence }}")) == command


@pytest.mark.parametrize(
    ("source", "distribution", "module", "key"),
    [
        ("nvidia", "Debian", "nvidia", "/var/lib/dkms/mok.pub"),
        ("nvidia", "Ubuntu", "nvidia", "/var/lib/shim-signed/mok/MOK.der"),
        ("distribution", "Debian", "nvidia-current-open", "/var/lib/dkms/mok.pub"),
        ("distribution", "Ubuntu", "nvidia", "/var/lib/shim-signed/mok/MOK.der"),
    ],
)
def test_names_of_the_module_and_of_the_key_that_signs_it(
    example: Any, source: str, distribution: str, module: str, key: str
) -> None:
    known = {
        "nvidia_driver_source": source,
        "ansible_facts": {"distribution": distribution},
        "_nvidia_driver_pci": {"kernel_modules": ["open"]},
    }
    role = example("nvidia_driver", "gpu1", **known)
    assert role.template(trusted("{{ _nvidia_driver_module }} {{ _nvidia_driver_mok }}")) == f"{module} {key}"
    check = next(
        t for t in yaml.safe_load(SERVICE.read_text()) if t["name"].startswith("Read the version that is built")
    )
    assert role.template(trusted(check["ansible.builtin.command"])) == f"modinfo --field=version {module}"


def test_the_gpu_exporter_s_messages_are_in_the_journal(example: Any) -> None:
    text = written(example("dcgm_exporter", "gpu1"), "dcgm_exporter", "unit.conf.j2")
    assert "\nStandardOutput=journal\nStandardError=journal\n" in text


def test_docker_keeps_what_others_have_set_and_the_second_run_changes_nothing(example: Any) -> None:
    before = {"data-root": "/data/docker", "runtimes": {"nvidia": {"path": "x"}}, "log-opts": {"labels": "a"}}
    for text in ("", json.dumps(before)):
        slurped = {"content": base64.b64encode(text.encode()).decode()} if text else {"msg": "no file", "failed": True}
        first = written(
            example("container_engine", "infra1", _container_engine_before=slurped),
            "container_engine",
            "daemon.json.j2",
        )
        made = json.loads(first)
        assert made["live-restore"] is True
        assert made.get("data-root") == (before["data-root"] if text else None)
        assert made["log-opts"] == ({"labels": "a"} if text else {}) | {"max-size": "50m", "max-file": "3"}
        slurped = {"content": base64.b64encode(first.encode()).decode()}
        assert first == written(
            example("container_engine", "infra1", _container_engine_before=slurped),
            "container_engine",
            "daemon.json.j2",
        )


def test_a_roll_that_failed_ends_its_own_helm_and_no_other_cluster_s(example: Any, tmp_path: Path) -> None:
    play = example("helm_release", "localhost", helm_release_kubeconfig="/state/a/kubeconfig")
    pattern = str(play.template(trusted("{{ _helm_release_process }}"))).strip()

    def command(cluster: str, *words: str) -> str:
        return " ".join(["/venv/bin/helm", f"--kubeconfig=/state/{cluster}/kubeconfig", "--namespace=ictx", *words])

    upgrade = ("upgrade", "--install", "--wait", "ictx", "/cache/serving.tgz")
    name = str(play.template(trusted("{{ helm_release_name }}")))
    upgrade = tuple(name if word == "ictx" else word for word in upgrade)
    assert re.search(pattern, command("a", *upgrade))
    assert not re.search(pattern, command("b", *upgrade))
    assert not re.search(pattern, command("a", "history", name))
