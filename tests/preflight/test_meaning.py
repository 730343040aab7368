# ruff: noqa: E501 (problems stand here as people see them, in one line)
"""Values that have the right form and make no sense together are refused, each in a line with what to do."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT
from test_check_inventory import problems

SPEC = importlib.util.spec_from_file_location("meaning", ROOT / "playbooks/plugins/filter/meaning.py")
assert SPEC
assert SPEC.loader
meaning = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(meaning)

LONG = "x" * 70


def found(folder: Path, variables: dict[str, Any], hosts: Callable[[Any], None] | None = None) -> set[str]:
    """Returns the problems of a copy of the lab's inventory with other variables and hosts."""
    copy = shutil.copytree(ROOT / "inventories/lab", folder / "inventory")
    (copy / "group_vars/all/zz_test.yml").write_text(yaml.safe_dump(variables))
    if hosts:
        file = copy / "hosts.yml"
        content = yaml.safe_load(file.read_text())
        hosts(content["all"]["children"])
        file.write_text(yaml.safe_dump(content, sort_keys=False))
    return set(problems(copy))


def test_partitions_and_the_jobs_that_go_there(tmp_path: Path) -> None:
    variables = {
        "slurm_partitions": [
            {"name": "batch", "nodes": ["n1", "n9"], "default": True, "max_time": "1:00:00"},
            {"name": "urgent", "nodes": "n[1-3],n2", "default": True, "allow_qos": ["urgnt"]},
            {"name": "none", "nodes": []},
            {"name": "odd", "nodes": "n[3-1]"},
            {"name": "open", "nodes": "n[1"},
        ],
        "slurm_qos": [{"name": "normal"}, {"name": "urgent", "users": ["researchr"]}, {"name": "urgent"}],
        "slurm_jobs_partition": "batch",
        "slurm_jobs_time": "2:00:00",
        "slurm_jobs_grace_seconds": 7200,
        "slurm_jobs_nodes": 2,
        "slurm_jobs_stages": {
            "extend": {"config": "extend/tiny.yaml", "after": "pretrain", "partition": "btch"},
            "sft": {"config": "sft/tiny.yaml", "after": "extend", "gpus_per_node": 4, "nodes": 1},
        },
    }
    stages = "slurm_jobs_stages: "
    assert found(tmp_path, variables) == {
        "slurm_partitions: batch has the node n9, which is not in slurm_compute",
        "slurm_partitions: urgent has the node n3, which is not in slurm_compute",
        "slurm_partitions: urgent has the node n2 2 times",
        "slurm_partitions: urgent allows the QOS urgnt, which is not in slurm_qos; did you mean urgent?",
        "slurm_partitions: batch and urgent are both the default: let one be",
        "slurm_partitions: none has no nodes: list some, or write nodes: ALL",
        "slurm_partitions: odd: [3-1] is no range of numbers",
        "slurm_partitions: open: n[1 is no list of nodes",
        "slurm_qos: urgent is for researchr, who is not one of ictx_users; did you mean researcher?",
        "slurm_qos: 2 items have the name urgent",
        "slurm_jobs_time: 2:00:00 is more than the partition batch allows (1:00:00): jobs would never start",
        "slurm_jobs_grace_seconds: 7200 is not less than slurm_jobs_time (2:00:00)",
        "slurm_jobs_nodes: 2 nodes, but the partition batch has 1: jobs would never start",
        f"{stages}extend: partition: there is no partition btch in slurm_partitions, only batch, urgent, none, odd, open",
        f"{stages}sft: gpus_per_node: 4 GPUs on each of 1 nodes, but slurm_gres of the partition batch has at most 0 a node",
        f"{stages}sft: time: 2:00:00 is more than the partition batch allows (1:00:00): jobs would never start",
        f"{stages}sft: grace_seconds: 7200 is not less than slurm_jobs_time (2:00:00)",
    }


def test_accounts_name_what_exists(tmp_path: Path) -> None:
    variables = {
        "slurm_qos": [
            {"name": "normal"},
            {"name": "High", "preempt": ["Normal", "nrmal"]},
            {"name": "high"},
            {"name": "old", "state": "absent"},
        ],
        "slurm_accounts": [
            {"name": "Physics", "parent": "Optics", "qos": ["HIGH", "old"]},
            {"name": "optics", "parent": "physics"},
            {"name": "chemistry", "parent": "science"},
            {"name": "science", "state": "absent"},
        ],
        "slurm_associations": [
            {"user": "researcher", "account": "PHYSICS", "default": True, "default_qos": "lw"},
            {"user": "researcher", "account": "optics", "default": True},
            {"user": "researchr", "account": "ictx"},
            {"user": "researcher", "account": "science"},
        ],
        "slurm_partitions": [
            {"name": "batch", "default": True, "allow_qos": ["HIGH"], "allow_accounts": ["Optics", "art"]},
        ],
    }
    accounts, associations = "slurm_accounts: ", "slurm_associations: "
    assert found(tmp_path, variables) == {
        "slurm_qos: High preempts nrmal, which is not in slurm_qos; did you mean normal?",
        "slurm_qos: High has preempt, which counts with slurm_preempt_type: qos only",
        "slurm_qos: 2 items have the name high",
        f"{accounts}Physics has the QOS old, which is not in slurm_qos",
        f"{accounts}chemistry is below science, which is not in slurm_accounts",
        f"{accounts}physics is below itself",
        f"{accounts}optics is below itself",
        f"{associations}researcher PHYSICS has the QOS lw, which is not in slurm_qos",
        f"{associations}one is of researchr, who is not one of ictx_users; did you mean researcher?",
        f"{associations}researcher is in science, which is not in slurm_accounts",
        f"{associations}researcher has 2 default accounts: let one be",
        "slurm_partitions: batch allows the account art, which is not in slurm_accounts",
    }


def test_a_topology_has_each_node_once(tmp_path: Path) -> None:
    variables = {
        "slurm_topology": [
            {"name": "spine", "switches": ["leaf1", "leaf3"]},
            {"name": "leaf1", "nodes": "n[1,9]"},
            {"name": "leaf2", "nodes": ["n1"], "switches": ["leaf1"]},
            {"name": "leaf4"},
        ],
    }
    assert found(tmp_path, variables) == {
        "slurm_topology: spine is above leaf1, which is not listed before it",
        "slurm_topology: spine is above leaf3, which is not listed before it",
        "slurm_topology: leaf1 has the node n9, which is not in slurm_compute",
        "slurm_topology: leaf2 needs nodes or switches, and not both",
        "slurm_topology: n1 is at leaf1 and at leaf2: take it out of one",
        "slurm_topology: leaf4 needs nodes or switches, and not both",
        "slurm_topology: n2 is at no switch: no job would have it together with another node",
    }


def test_hosts_resources_and_networks(tmp_path: Path) -> None:
    def hosts(groups: Any) -> None:
        groups["slurm_compute"]["hosts"] |= {
            "1001": {"ansible_host": "192.0.2.1"},
            LONG: {"ansible_host": "192.0.2.2"},
            "n5": {"ansible_host": "10.203.77.22"},
            "n6": {"ansible_host": "0.0.0.0"},
            "n7": {"ansible_host": "10.42.3.7"},
            "n8": {"ansible_host": "192.0.2.8", "slurm_gres": [{"name": "gpu", "type": "a", "count": 2}] * 2},
            "n9": {"ansible_host": "192.0.2.9", "slurm_real_memory_mb": 1000, "slurm_reserved_memory_mb": 1000},
            "n10": {
                "ansible_host": "192.0.2.10",
                "slurm_gres": [{"name": "gpu", "type": "a100", "count": 8, "file": "/dev/nvidia[0-3]"}],
            },
            "n11": {"ansible_host": "192.0.2.11", "slurm_pam_adopt": True},
        }
        groups["k3s_server"]["hosts"] |= {"Kube_2": {"ansible_host": "192.0.2.41"}}
        groups["k3s_agent"] = {"hosts": {"n10": None}}
        groups["slurm_controller"]["hosts"] |= {"ctl2": {"ansible_host": "192.0.2.12"}}

    config = {"k3s_config": {"service-cidr": "10.42.128.0/17"}, "slurm_state_dir": "/var/lib/slurm/state"}
    assert found(tmp_path, config, hosts) == {
        "host 1001: is a number, which programs take for an address: give it a name",
        f"host {LONG}: has a name of more than 64 characters (63 a label), which no certificate can have",
        "ansible_host: n2 and n5 have the same address, 10.203.77.22",
        "ansible_host (n6): 0.0.0.0 is no address of a host",
        "k3s_config.cluster-cidr: 10.42.0.0/16 has the address of n7 (10.42.3.7): take another network",
        "k3s_config.cluster-cidr: 10.42.0.0/16 overlaps k3s_config.service-cidr (10.42.128.0/17)",
        "slurm_gres (n8): 2 items are gpu:a: add their counts up",
        "slurm_reserved_memory_mb (n9): 1000 leaves nothing of slurm_real_memory_mb (1000)",
        "slurm_gres (n10): gpu:a100 has the count 8, but /dev/nvidia[0-3] are 4 devices",
        "host n10: has GPUs for jobs (slurm_gres) and is a node of Kubernetes: two schedulers would allocate the same",
        "slurm_pam_adopt (n11): needs cgroups: set slurm_process_tracking: cgroup",
        "host Kube_2: is a node of Kubernetes, whose names have neither capitals nor '_': name it kube-2",
        "group k3s_server: has 2 hosts: etcd survives the loss of fewer than half, so take 1 or 3",
        "slurm_state_dir: /var/lib/slurm/state is not shared, but there are 2 controllers: put it below /shared, or the "
        "backup starts without the jobs",
    }


@pytest.mark.parametrize(
    "address", ["{}", '{ansible_host: "fd00:10::N"}', "{ansible_host: 198.51.100.N, ictx_address: 192.0.2.N}"]
)
def test_hosts_may_have_names_alone_ipv6_or_two_addresses(tmp_path: Path, address: str) -> None:
    copy = shutil.copytree(ROOT / "inventories/example", tmp_path / "inventory")
    text = re.sub(
        r"\{ansible_host: 192\.0\.2\.(\d+)\}",
        lambda found: address.replace("N", found[1]),
        (copy / "hosts.yml").read_text(),
    )
    (copy / "hosts.yml").write_text(text)
    assert [problem for problem in problems(copy) if "CHANGE-ME" not in problem] == []


def test_groups_of_nodes(tmp_path: Path) -> None:
    a100 = {"name": "gpu", "type": "a100", "count": 4, "file": "/dev/nvidia[0-3]"}
    variables = {
        "slurm_node_groups": [
            {"name": "big", "nodes": "n[1-3]", "cpus": 24, "gres": [a100]},
            {"name": "small", "nodes": ["n2"], "sockets": 2, "gres": [{**a100, "count": 8}]},
            {"name": "open", "nodes": "n[1"},
        ],
        "slurm_jobs_gpus_per_node": 4,
        "slurm_config": {"NodeName": "n3", "SchedulerParameters": "bf_continue,bf_window=2880", "MailProg": None},
    }
    assert found(tmp_path, variables) == {
        "slurm_config: NodeName has a place of its own: slurm_node_groups",
        "slurm_node_groups: big has the node n3, which is not in slurm_compute",
        "slurm_node_groups: n2 is in big and in small: take it out of one",
        "slurm_node_groups: small needs sockets, cores_per_socket and threads_per_core, or cpus alone",
        "slurm_node_groups: small: gpu:a100 has the count 8, but /dev/nvidia[0-3] are 4 devices",
        "slurm_node_groups: open: n[1 is no list of nodes",
    }


def test_devices_of_mig_are_those_that_the_driver_makes(tmp_path: Path) -> None:
    caps = "/dev/nvidia-caps/nvidia-cap"
    two = [f"/dev/nvidia3,{caps}{number},{caps}{number + 1}" for number in (408, 417)]
    right = {"name": "gpu", "type": "a100_3g.20gb", "count": 2, "devices": two}
    whole = {"name": "gpu", "type": "a100", "count": 3, "file": "/dev/nvidia[0-2]"}

    def hosts(*gres: Any, profiles: Any = ("3g.20gb", "3g.20gb"), gpus: Any = (3,)) -> Callable[[Any], None]:
        driver = [{"gpus": list(gpus), "profiles": list(profiles)}]
        host = {"ansible_host": "192.0.2.8", "slurm_gres": list(gres), "nvidia_driver_mig": driver}

        def add(groups: Any) -> None:
            for name in ("slurm_compute", "gpu"):
                groups.setdefault(name, {}).setdefault("hosts", {})
                groups[name]["hosts"] = {**(groups[name]["hosts"] or {}), "n8": host if name == "gpu" else None}

        return add

    assert found(tmp_path / "a", {}, hosts(right, whole)) == set()
    assert found(tmp_path / "b", {}, hosts({**whole, "count": 4, "file": "/dev/nvidia[0-3]"})) == {
        "slurm_gres (n8): gpu:a100 has /dev/nvidia3, which nvidia_driver_mig divides: give its MIG devices in devices"
    }
    assert found(tmp_path / "c", {}, hosts(right, profiles=["1g.5gb"])) == {
        "slurm_gres (n8): gpu:a100_3g.20gb has devices, but nvidia_driver_mig makes 1g.5gb: name it after one"
    }
    assert found(tmp_path / "d", {}, hosts(right, profiles=["3g.20gb"])) == {
        "slurm_gres (n8): gpu:a100_3g.20gb has the count 2, but nvidia_driver_mig makes 1"
    }
    assert found(tmp_path / "e", {}, hosts({**right, "count": 3}, gpus=[])) == {
        "slurm_gres (n8): gpu:a100_3g.20gb has the count 3, but its devices are 2"
    }


def test_gpus_of_groups_and_of_measured_nodes_count_for_jobs(tmp_path: Path) -> None:
    a100 = {"name": "gpu", "type": "a100", "count": 4}
    variables = {
        "slurm_measured_nodes": [{"nodes": "n[1-2]", "gres": [{**a100, "count": 2}]}],
        "slurm_node_groups": [{"name": "big", "nodes": "n1", "gres": [a100]}],
        "slurm_jobs_gpus_per_node": 4,
    }
    assert found(tmp_path, variables) == {
        "slurm_jobs_gpus_per_node: 4 GPUs on each of 2 nodes, but slurm_gres of the partition batch has at most 4 a node"
    }


def test_services_folders_and_receivers(tmp_path: Path) -> None:
    variables = {
        "ictx_registry": "registry.example.org:443",
        "ictx_state_dir": "/shared/state",
        "ictx_cache_dir": "/usr/",
        "ictx_backup": True,
        "ictx_backup_repository": "",
        "ictx_mlflow_values": {"service": {"type": "NodePort", "nodePort": 30800}},
        "ictx_serving_values": {"service": {"type": "NodePort", "nodePort": 30800}},
        "nvidia_driver_branch": "580",
        "nvidia_driver_version": "570.1.2",
        "alertmanager_listen": ":9090",
        "storage_type": "nfs",
        "storage_nfs_clients": [],
        "alertmanager_receivers": [
            {"name": "watchdog", "slack_url_file": "/x"},
            {"name": "ops"},
            {"name": "mail", "email_to": "ops@example.org"},
            {"name": "mail", "webhook_url": "https://example.org/hook"},
        ],
    }
    names = "svc1, 10.203.77.31"

    def hosts(groups: Any) -> None:
        groups["storage_server"] = {"hosts": {"svc1": None}}

    assert found(tmp_path, variables, hosts) == {
        "ictx_registry: registry.example.org:443 has not the port 5000 (registry_port) at its end",
        f"ictx_registry: registry.example.org is not a name of svc1, so that its certificate lacks it: take one of {names}, "
        "or add it to registry_hosts",
        "ictx_state_dir: /shared/state has the platform's secrets, and is on shared storage (/shared): move it",
        "ictx_cache_dir: /usr/ is the system's: take a folder of its own, such as /usr/ictx",
        "ictx_backup_repository: is not set, but ictx_backup is on: name a repository of restic",
        "ictx_mlflow_uri: its port is 30500, but MLflow's nodePort is 30800",
        "ictx_serving_values: service.nodePort 30800 is that of ictx_mlflow_values too",
        "storage_nfs_clients: is empty, so that no node can mount the export: list the nodes' networks",
        "nvidia_driver_version: 570.1.2 is not of nvidia_driver_branch 580",
        "prometheus_listen (svc1): alertmanager_listen listens on port 9090 too",
        "prometheus_runbook_url: must be an address where receivers of alerts can open docs/runbooks, as "
        "https://git.example.org/docs",
        "alertmanager_receivers: watchdog has slack_url_file, and needs slack_channel",
        "alertmanager_receivers: ops needs webhook_url, slack_url_file or email_to",
        "alertmanager_receivers: mail has email_to, which needs alertmanager_smtp",
        "alertmanager_receivers: 2 items have the name mail",
        "alertmanager_receivers: /x is not on the control host: put it there",
        "alertmanager_receivers: mail and mail would get nothing: of those without matchers ops gets all; add matchers",
    }


@pytest.mark.parametrize(
    ("releases", "line"),
    [
        (
            [{"name": "a", "model": "m", "wieght": 5}],
            "ictx_serving_releases (all hosts): ictx_serving_releases.wieght. Supported parameters include: alias, model, name, state, values, version, weight.",
        ),
        (
            [{"name": "a", "weight": "much"}],
            "ictx_serving_releases (all hosts): each item weight must be a whole number from 0 to 2147483647, got 'much'",
        ),
        ([{"name": "a", "model": "m"}, {"name": "a", "model": "n"}], "ictx_serving_releases (all hosts): 2 items have the name a"),
        (
            [{"name": "a", "weight": 5}],
            "ictx_serving_releases: a: has a weight, and serves what ictx serves (@champion): set version, or another alias",
        ),
        (
            [{"name": "a", "model": "m", "values": {"service": {"type": "NodePort", "nodePort": 30800}}}],
            "ictx_serving_releases: a: service.nodePort 30800 is that of ictx_serving_values too",
        ),
        ([{"name": "a", "model": "m", "values": {"vllm": {"extraArgs": ["--a b\n"]}}}, {"name": "b", "version": 2, "weight": 0}], None),
    ],
)  # fmt: skip
def test_further_releases(tmp_path: Path, releases: Any, line: str | None) -> None:
    assert found(tmp_path, {"ictx_serving_releases": releases}) == ({line} if line else set())


def test_jobs_of_prometheus(tmp_path: Path) -> None:
    plays = yaml.safe_load((ROOT / "playbooks/monitoring.yml").read_text())
    (own,) = (play["vars"] for play in plays if play["name"] == "Prometheus")
    named = own["monitoring_scrapes"] + own["monitoring_mlflow_scrapes"]
    assert {scrape["name"] for scrape in named} == set(meaning.OWN_JOBS)

    static = {"static_configs": [{"targets": ["192.0.2.1:9100"]}]}
    variables = {
        "prometheus_extra_scrapes": [{"name": "http", "targets": []}, {"name": "dcgm", "targets": []}],
        "prometheus_extra_scrape_configs": [
            {"job_name": "node", **static},
            {"job_name": "http", "file_sd_configs": [{"files": ["/etc/x.json"]}]},
            {"job_name": "none", "scheme": "https"},
            static,
        ],
    }
    native = "prometheus_extra_scrape_configs"
    assert found(tmp_path, variables) == {
        f"{native}: 2 jobs have the name node, which is one of ours: give each another",
        f"{native}: 2 jobs have the name http: give each another",
        f"{native}: each item needs a job_name",
        f"{native}: none finds no targets: add static_configs, or one of the *_sd_configs",
        "prometheus_extra_scrapes: 2 jobs have the name dcgm, which is one of ours: give each another",
    }


@pytest.mark.parametrize(
    ("ours", "external", "lines"),
    [
        (True, {}, {"ictx_registry_external: has no effect: svc1 in the group registry is ours: empty the group, or remove this"}),
        (
            False,
            None,
            {
                "group registry: has no host: add one, or set ictx_registry_external to how the registry at ictx_registry is used "
                "({} if by everybody)"
            },
        ),
        (False, {}, set()),
        (
            False,
            {"user": "robot$ictx+pull", "push_password_file": "/nonexistent/push", "ca_file": "/nonexistent/ca.crt"},
            {
                "ictx_registry_external: needs both user and password_file, or neither",
                "ictx_registry_external: needs both push_user and push_password_file, or neither",
                "ictx_registry_external: push_password_file /nonexistent/push is not on the control host: put it there",
                "ictx_registry_external: ca_file /nonexistent/ca.crt is not on the control host: put it there",
            },
        ),
    ],
)  # fmt: skip
def test_a_registry_that_somebody_else_runs(tmp_path: Path, ours: bool, external: Any, lines: set[str]) -> None:
    def hosts(groups: Any) -> None:
        groups["registry"] = {"hosts": {"svc1": None} if ours else {}}

    variables = {} if ours else {"ictx_registry": "harbor.example.org"}
    variables |= {} if external is None else {"ictx_registry_external": external}
    assert found(tmp_path, variables, hosts) == lines


def test_sign_in_at_a_provider(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    right = {"issuer": "https://sso.example.org", "client_id": "mlflow", "client_secret_file": str(tmp_path / "secret")}
    assert found(tmp_path / "a", {"ictx_mlflow_oidc": {**right, "url": "https://mlflow.example.org"}}) == set()
    wrong = {"issuer": "http://sso.example.org", "url": "http://m.example.org", "ca_file": "/nonexistent/ca.crt"}
    assert found(tmp_path / "b", {"ictx_mlflow_oidc": {**right, **wrong}}) == {
        "ictx_mlflow_oidc: issuer is 'http://sso.example.org': must be the provider's https:// URL",
        "ictx_mlflow_oidc: sessions would be readable on the network: set url to https://",
        "ictx_mlflow_oidc: ca_file /nonexistent/ca.crt is not on the control host: put it there",
    }


def test_settings_of_units(tmp_path: Path) -> None:
    dropins = {
        "slurmd": {"Service": {"LimitNOFILE": 1048576, "Environment": ["A=1", "B=2"], "MemoryMax": None}},
        "ictx-backup.timer": {"Timer": {"OnCalendar": ["", "daily"]}, "Service": {"Nice": 5}},
        "slurmdb": {"Service": {"Nice": 5}},
        "squid": {"Service": {"Nice": 5}},
        "slurmctld": {"LimitNOFILE": 5, "Service": {}},
        "munge": "LimitNOFILE=5",
        "docker": {"Service": {"Environment": ["A=b\\", "C=d"]}},
        "k3s": {"Service": {"limit": 5, "Nice": {"x": 1}}, "Install": {"WantedBy": "x"}},
    }
    assert found(tmp_path, {"ictx_unit_dropins": dropins}) == {
        "ictx_unit_dropins: ictx-backup.timer has the section Service, which must be Unit or Timer",
        "ictx_unit_dropins: slurmdb is no unit of ours; did you mean slurmdbd?",
        "ictx_unit_dropins: squid is no unit of ours",
        "ictx_unit_dropins: slurmctld has the section LimitNOFILE, which must be Unit or Service",
        "ictx_unit_dropins: slurmctld Service must be a dictionary of directives, as {LimitNOFILE: 1048576}",
        "ictx_unit_dropins: munge must be a dictionary of sections, as {Service: {LimitNOFILE: 1048576}}",
        "ictx_unit_dropins: docker Service Environment ends with a backslash, which would take in the next line",
        "ictx_unit_dropins: k3s Service has limit, which no directive is called",
        "ictx_unit_dropins: k3s Service Nice must be text, a number or a list of them",
        "ictx_unit_dropins: k3s has the section Install, which must be Unit or Service",
    }


def test_proxies_and_versions_of_packages(tmp_path: Path) -> None:
    variables = {
        "ictx_proxy": {"http": "http://proxy.example.org", "no_proxy": [".example.org"]},
        "common_apt_pins": [
            {"packages": ["slurmctld", "slurmd"], "version": "22.05.8*"},
            {"packages": ["slurmd", "grafana"], "version": "11*"},
        ],
        "prometheus_source": "upstream",
        "prometheus_version": "3.99.0",
    }
    assert found(tmp_path, variables) == {
        "ictx_proxy: http: http://proxy.example.org has no port, of which programs take different ones: add it, as :3128",
        "common_apt_pins (all hosts): slurmd has 2 pins, of which apt takes the first: leave one",
        "common_apt_pins (all hosts): grafana has a variable of its own: grafana_version",
        "prometheus_version: 3.99.0 is not one of prometheus_checksums (3.13.2): add the SHA-256 of its archive",
    }
    assert found(tmp_path / "known", {"prometheus_source": "upstream"}) == set()


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("http://proxy:3128", "must be a dictionary, got 'http://proxy:3128'"),
        ({"http": "proxy:3128"}, "http must be http(s)://HOST[:PORT][/PATH] without a user or password, got 'proxy:3128'"),
        ({"http": "http://a:b@proxy:1"}, "http must be http(s)://HOST[:PORT][/PATH] without a user or password, got 'http://a:b@proxy:1'"),
        ({"http": "http://proxy:1", "no_proxy": "a,b"}, "no_proxy must be a list, got 'a,b'"),
        (
            {"http": "http://proxy:1", "no_proxy": ["https://x.example.org/"]},
            "no_proxy each item must be a host, address, domain (.example.org) or network (192.0.2.0/24), got 'https://x.example.org/'",
        ),
        ({"no_proxy": ["x"]}, "has neither http nor https: set one, as {http: http://proxy.example.org:3128}"),
    ],
)  # fmt: skip
def test_proxies_of_another_form(tmp_path: Path, value: Any, problem: str) -> None:
    assert {text.replace(" (all hosts)", "") for text in found(tmp_path, {"ictx_proxy": value})} == {
        f"ictx_proxy: {problem}"
    }


def test_values_that_yaml_reads_as_others_and_names_that_programs_change(tmp_path: Path) -> None:
    copy = shutil.copytree(ROOT / "inventories/lab", tmp_path / "inventory")
    (copy / "group_vars/all/zz_test.yml").write_text("""
slurm_jobs_time: 24:00:00
slurm_partitions: [{name: batch, nodes: ALL, max_time: 12:00:00}]
image_bake_python: 3.10
nvidia_driver_version: 580.95
ictx_cluster_name: Alpha
ictx_registry: fd00:10::15:5000
ictx_users: [{name: Dora, uid: 2001}, {name: root, uid: 2002}, {name: eve, uid: 2003}, {name: eva, uid: 2003}]
ictx_promoters: [eve]
slurm_qos: [{name: normal}]
storage_nfs_clients: 10.0.0.0/8
""")
    quotes = "must be text: put it in quotes"
    system = "must be a login name of small letters, digits, '_' or '-' that no account or group of the system has"
    assert set(problems(copy)) == {
        f"slurm_jobs_time (all hosts): {quotes}",
        f"slurm_partitions (all hosts): each item max_time {quotes}",
        f"image_bake_python (all hosts): {quotes}",
        f"nvidia_driver_version (all hosts): {quotes}",
        "ictx_cluster_name (all hosts): must be 1 to 63 small letters, digits or '-', the first and last no sign, got 'Alpha'",
        "ictx_registry (all hosts): must be HOST or HOST:PORT, got 'fd00:10::15:5000'",
        f"ictx_users (all hosts): each item name {system}, got 'Dora'",
        f"ictx_users (all hosts): each item name {system}, got 'root'",
        "storage_nfs_clients (all hosts): must be a list, got '10.0.0.0/8'",
    }


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu1", ["gpu1"]),
        ("gpu[1-3,7],cpu1", ["gpu1", "gpu2", "gpu3", "gpu7", "cpu1"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_lists_of_nodes(text: str, names: list[str]) -> None:
    assert meaning.nodes(text) == names


@pytest.mark.parametrize(
    ("text", "value"),
    [("90", 90), ("1:30", 1.5), ("1:00:00", 60), ("1-12", 2160), ("7-00:00:00", 10080), ("UNLIMITED", float("inf"))],
)
def test_time_limits(text: str, value: float) -> None:
    assert meaning.minutes(text) == value
