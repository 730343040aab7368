# ruff: noqa: E501 (each problem is one line, as users see it)
"""Preflight rejects settings of hosts, ports, users, storage, backups, monitoring and Kubernetes that would fail later."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest
from cluster import ROOT
from programs import loaded

meaning = loaded(ROOT / "playbooks/plugins/filter/meaning.py")
storage = loaded(ROOT / "playbooks/plugins/filter/meaning_storage.py")

HOSTS = {
    "slurm_controller": ["ctl1"], "slurm_compute": ["n1", "n2"], "slurm_login": ["login1"], "storage_server": ["nas1"],
    "prometheus": ["infra1"], "k3s_server": ["k1"], "k3s_agent": ["k2"],
}  # fmt: skip
BASE = {
    "ansible_user": "admin",
    "ictx_shared_dir": "/shared",
    "slurm_partitions": [{"name": "batch", "default": True}],
    "storage_nfs_clients": ["192.0.2.0/24"],
    "storage_type": "nfs",
    "prometheus_runbook_url": "https://git.example.org/runbooks",
    "k3s_checksums": {"v1.34.2+k3s1": {}},
    "k3s_version": "v1.34.2+k3s1",
}
LISTENING = {"infra1": {"_listening": {"registry_port", "registry_metrics_listen", "prometheus_listen", "node_exporter_listen"}},
             "k1": {"_listening": {"node_exporter_listen"}}, "ctl1": {"_listening": {"node_exporter_listen"}}}  # fmt: skip
ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE5vdGhpbmdUb1NlZUhlcmVNb3ZlQWxvbmdQbGVhc2Uh"
HOOK = {"webhook_url": "https://chat.example.org/hook"}


def found(
    groups: dict[str, list[str]] | None = None, per_host: dict[str, dict[str, Any]] | None = None, **variables: Any
) -> list[str]:
    """Returns the problems of a small cluster with other groups and variables, as VARIABLE (HOST): TEXT."""
    members = {**HOSTS, **(groups or {})}
    hosts = sorted({host for members in members.values() for host in members})
    members |= {
        "slurm": [host for name in members if name.startswith("slurm_") for host in members[name]],
        "all": hosts,
    }
    values = {
        host: {"ansible_host": f"192.0.2.{number}", **BASE, **variables, **LISTENING.get(host, {}), **(per_host or {}).get(host, {})}
        for number, host in enumerate(hosts, 1)
    }  # fmt: skip
    problems = meaning.meaning_problems(values, members)
    return [f"{name}{f' ({host})' if host else ''}: {text}" for name, text, host in problems]


def at(address: str, **more: Any) -> dict[str, Any]:
    return {"per_host": {"n2": {"ansible_host": address, **more}}}


def user(*keys: str, **parts: Any) -> dict[str, Any]:
    return {"ictx_users": [{"name": "alice", "uid": 2001, "ssh_keys": list(keys), **parts}]}


def receivers(*given: Any) -> dict[str, Any]:
    return {"alertmanager_receivers": [{**HOOK, **one} for one in given]}


def scrape(**parts: Any) -> dict[str, Any]:
    return {"prometheus_extra_scrapes": [{"name": "x", "targets": [{"address": "h.example.org:9100"}], **parts}]}


def native(**parts: Any) -> dict[str, Any]:
    return {
        "prometheus_extra_scrape_configs": [
            {"job_name": "x", "static_configs": [{"targets": ["h.example.org:9100"]}], **parts}
        ]
    }


def opened(*ports: str, source: str = "192.0.2.0/24") -> dict[str, Any]:
    return {"firewall_extra": [{"what": "x", "ports": list(ports), "from": [source]}]}


FOLDERS = [{"path": path, "mode": "0755"} for path in (".", "bundles", "data", "images", "runs")]
RIGHT: dict[str, dict[str, Any]] = {
    "base": {},
    "IPv6": at("fd00::15", ictx_address="192.0.2.200"),
    "a domain": {"groups": {"slurm_login": ["login1.example.org", "n1b.example.org"]}},
    "a name": {"per_host": {"n2": {"ansible_host": "n2.example.org"}}},
    "a tunnel": at("127.0.0.1", ansible_port=2222, ictx_address="192.0.2.200"),
    "this machine": {"per_host": {"n2": {"ansible_connection": "local"}}},
    "groups": {"groups": {"gpu_old": ["n1"], "rack1": ["n1", "n2"], "slurm_compute_a100": ["n1"]}},
    "external": {"groups": {"storage_server": []}, "storage_type": "external"},
    "keys": user(ED25519, f"{ED25519} alice@laptop", f'from="192.0.2.*",no-pty {ED25519} a b'),
    "ports": {"per_host": {"infra1": {"prometheus_listen": ":9095", "registry_port": 443, "registry_metrics_listen": "127.0.0.1:5001"}}},
    "clients by name": {"storage_nfs_clients": ["*.example.org", "@nodes"]},
    "folders": {"storage_folders": [*FOLDERS, {"path": "scratch", "mode": "1777"}], "storage_user_folders": [{"path": "scratch", "mode": "0700"}]},
    "backups": {"backup_keep": {"daily": 7, "yearly": 0}, "backup_extra_paths": {"site-files": "/srv/site"}, "ictx_backup_repository": "/srv/backup"},
    "receivers": receivers({"name": "all"}, {"name": "night", "matchers": ["severity=critical"]}, {"name": "watchdog"}),
    "scrapes": {**scrape(name="y"), **native(scrape_interval="1m30s", metric_relabel_configs=[])},
    "probes": scrape(module="https", targets=[{"address": "https://h.example.org/x"}]),
    "probes without a scheme": scrape(module="http", targets=[{"address": "h.example.org"}]),
    "probes of TCP": scrape(module="tcp", targets=[{"address": "h.example.org:22"}]),
    "SMTP": {"alertmanager_smtp": {"smarthost": "m:25", "from": "a@b"}},
    "networks": {"per_host": {"k1": {"k3s_config": {"cluster-cidr": "10.60.0.0/16,fd01::/56", "service-cidr": "10.61.0.0/16,fd02::/112", "cluster-dns": "10.61.0.10"}}}},
    "agents behind": {"per_host": {"k2": {"k3s_version": "v1.33.6+k3s1", "k3s_checksums": {"v1.33.6+k3s1": {}}}}},
    "all labels": {"alertmanager_group_by": ["..."], "groups": {"alertmanager": ["infra1"]}, **receivers({"name": "a"})},
    "firewall for anybody": {"firewall_extra": [{"what": "x", "ports": ["80"]}, {"what": "y", "from": ["192.0.2.0/24"]}]},
    "reached": {"ictx_mlflow_uri": "https://localhost.example.org", "artifacts_mirror": "http://m.example.org", "ictx_registry": "r:5000", "ictx_registry_mirror_of": ["docker.io"]},
    "firewall": opened("80", "1000-1999", source="fd00::/64"),
    "postgres": {"grafana_database": {"type": "postgres", "host": "db:5432", "name": "g", "user": "g", "password_file": "/etc/hostname"}},
}  # fmt: skip
WRONG: dict[str, dict[str, Any]] = {
    "ansible_host (n2): 192.0.2.300 is not an address: write four numbers from 0 to 255": at("192.0.2.300"),
    "ansible_host (n2): 192.0.2 is not an address": at("192.0.2"),
    "ansible_host (n2): 192.0.2.022 is not an address": at("192.0.2.022"),
    "ansible_host (n2): 127.0.0.1 means the local machine on every other host: set ictx_address": at("127.0.0.1"),
    "ansible_host (n2): localhost means the local machine": at("localhost"),
    "ansible_host (n2): fe80::1 is valid on one network link only": at("fe80::1"),
    "ictx_address (n2): 169.254.3.3 is valid on one network link only": at("192.0.2.99", ictx_address="169.254.3.3"),
    "ansible_host (n2): 255.255.255.255 is not the address of a host": at("255.255.255.255"),
    "ictx_address: n1 and n2 have the same address, 192.0.2.77": {
        "per_host": {"n1": {"ictx_address": "192.0.2.77"}, "n2": {"ictx_address": "192.0.2.77", "ansible_port": 2222}}},
    "host n1: differs from N1 only in case, which DNS ignores": {"groups": {"slurm_login": ["login1", "N1"]}},
    "host n1.example.org: is n1 with its domain, which is the same machine for SLURM and DNS: remove one": {"groups": {"slurm_login": ["n1.example.org"]}},
    "host prometheus: has the same name as a group": {"groups": {"prometheus": ["prometheus"]}},
    "host localhost: is skipped by the plays: use the machine's name": {"groups": {"slurm_login": ["localhost"]}},
    "host n-.x: has a part that is empty, or begins or ends with '-'": {"groups": {"slurm_login": ["n-.x"]}},
    "ansible_connection: n1 and n2 are all this machine": {"per_host": {host: {"ansible_connection": "local"} for host in ("n1", "n2")}},
    "host k1: is in k3s_server and in k3s_agent: remove it from one": {"groups": {"k3s_agent": ["k1"]}},
    "group k3s_agent: has k2, but k3s_server has no host to join": {"groups": {"k3s_server": []}},
    "group k3s_agents: has no effect, and its hosts are not in k3s_agent: rename it": {"groups": {"k3s_agents": ["k3"]}},
    "kubernetes_distribution: debian is for the lab only: use k3s": {"kubernetes_distribution": "debian"},
    "storage_type: nfs needs a host in the group storage_server": {"groups": {"storage_server": []}},
    "group storage_server: has nas1, which storage_type: external does not use": {"storage_type": "external"},
    "ictx_users: alice: key 1 of ssh_keys is not a public SSH key": user("~/.ssh/id_ed25519.pub"),
    "ictx_users: alice: key 2 of ssh_keys is an incomplete key (ssh-ed25519): copy the line": user(ED25519, ED25519[:60]),
    "ictx_users: alice: key 1 of ssh_keys is an incomplete key (ssh-rsa)": user(ED25519.replace("ed25519", "rsa")),
    "ictx_users: alice: key 1 of ssh_keys is an incomplete key (ssh-ed25519)": user("ssh-ed25519"),
    "ictx_users: alice: key 1 of ssh_keys is a private key": user("-----BEGIN OPENSSH PRIVATE KEY-----"),
    "ictx_users: alice is absent, but Ansible logs in as this account": {**user(state="absent"), "ansible_user": "alice"},
    "node_exporter_listen (ctl1): :6817: slurmctld uses port 6817 on this host: choose another": {"per_host": {"ctl1": {"node_exporter_listen": ":6817"}}},
    "node_exporter_listen (k1): :30800: ports 30000 to 32767 are reserved": {"per_host": {"k1": {"node_exporter_listen": ":30800"}}},
    "node_exporter_listen (ctl1): 127.0.0.1:9100: Prometheus connects to the host's address": {"per_host": {"ctl1": {"node_exporter_listen": "127.0.0.1:9100"}}},
    "registry_port (infra1): registry_metrics_listen also listens on port 5001": {
        "per_host": {"infra1": {"registry_port": 5001, "registry_metrics_listen": "127.0.0.1:5001"}}},
    "storage_nfs_clients: lacks the network of n1 (192.0.2.6), which could not mount the export: add it": {"storage_nfs_clients": ["10.0.0.0/8"], "per_host": {}},
    "storage_nfs_clients: 192.0.2.0/33 is not an address or network": {"storage_nfs_clients": ["192.0.2.0/33"]},
    "storage_nfs_clients: 300.1.1.0/24 is not an address or network": {"storage_nfs_clients": ["192.0.2.0/24", "300.1.1.0/24"]},
    "storage_nfs_options: ro contradicts rw: remove it": {"storage_nfs_options": ["ro", "hard"]},
    "storage_nfs_options: suid contradicts nosuid": {"storage_nfs_options": ["rw", "suid"]},
    "storage_folders: lacks images, runs, which the platform uses": {"storage_folders": FOLDERS[:3]},
    "storage_user_folders: scratch is not one of storage_folders": {"storage_folders": FOLDERS, "storage_user_folders": [{"path": "scratch", "mode": "0700"}]},
    "storage_nfs_export: /etc is the system's": {"storage_nfs_export": "/etc"},
    "storage_nfs_export: /shared is on the shared directory (/shared), where its clients mount it": {"storage_nfs_export": "/shared"},
    "ictx_backup_repository: /tmp/backup is the system's, or emptied by a reboot": {"ictx_backup_repository": "/tmp/backup"},
    "ictx_backup_repository: /srv/state/backup is in ictx_state_dir, and lost with it": {
        "ictx_state_dir": "/srv/state", "ictx_backup_repository": "/srv/state/backup"},
    "prometheus_storage_dir: /shared/metrics is on the shared directory (/shared), a network file system": {"prometheus_storage_dir": "/shared/metrics"},
    "ictx_shared_dir: /opt/ictx belongs to the system": {"ictx_shared_dir": "/opt/ictx"},
    "ictx_shared_dir: /home belongs to the system": {"ictx_shared_dir": "/home"},
    "ictx_shared_dir: /dev/shm belongs to the system": {"ictx_shared_dir": "/dev/shm"},
    "backup_keep: has the unknown key day": {"backup_keep": {"day": 7}},
    "backup_keep: keeps nothing": {"backup_keep": {"daily": 0}},
    "backup_extra_paths: Home must be a name of lowercase letters": {"backup_extra_paths": {"Home": "/home"}},
    "backup_extra_paths: home: home must be an absolute path": {"backup_extra_paths": {"home": "home"}},
    "backup_on_calendar: *-*-* 25:30:00 is not a systemd calendar expression": {"backup_on_calendar": "*-*-* 25:30:00"},
    "k3s_etcd_snapshot_schedule: 0 25 * * * is not a cron schedule": {"k3s_etcd_snapshot_schedule": "0 25 * * *"},
    "k3s_etcd_snapshot_schedule: every day is not a cron schedule": {"k3s_etcd_snapshot_schedule": "every day"},
    "prometheus_interval: 5s must be from 10s": {"prometheus_interval": "5s"},
    "prometheus_interval: 10m must be from 10s": {"prometheus_interval": "10m"},
    "prometheus_extra_scrapes: x: module htpp does not exist; known modules: http, https, tcp": scrape(module="htpp"),
    "prometheus_extra_scrapes: x: ftp://h.example.org/x must be http:// or https:// for the module https": scrape(module="https", targets=[{"address": "ftp://h.example.org/x"}]),
    "prometheus_extra_scrapes: x: https://h.example.org must be HOST:PORT for the module tcp": scrape(module="tcp", targets=[{"address": "https://h.example.org"}]),
    "prometheus_extra_scrapes: x has a target without address": scrape(targets=[{"adress": "h:1"}]),
    "prometheus_extra_scrapes: x: h.example.org must be HOST:PORT": scrape(targets=[{"address": "h.example.org"}]),
    "prometheus_extra_scrapes: x: http://h.example.org:9100 must be HOST:PORT": scrape(targets=[{"address": "http://h.example.org:9100"}]),
    "prometheus_extra_scrape_configs: x: Prometheus has no scrap_interval; did you mean scrape_interval?": native(scrap_interval="5s"),
    "prometheus_extra_scrape_configs: x: scrape_interval is 5, must have a unit, such as 30s": native(scrape_interval=5),
    "prometheus_extra_scrape_configs: x: targets must be a list": native(static_configs=[{"targets": "h:9100"}]),
    "prometheus_extra_scrape_configs: x: http://h:9100/metrics must be HOST:PORT": native(static_configs=[{"targets": ["http://h:9100/metrics"]}]),
    "prometheus_remote_write: https://m.example.org/w needs both user and password_file": {"prometheus_remote_write": [{"url": "https://m.example.org/w", "user": "a"}]},
    "prometheus_rules_files: /nonexistent/rules.yml is not on the control host": {"prometheus_rules_files": ["/nonexistent/rules.yml"]},
    "alertmanager_group_by: has alertname 2 times": {"alertmanager_group_by": ["alertname", "alertname"]},
    "alertmanager_smtp: needs from": {"alertmanager_smtp": {"smarthost": "m:25"}},
    "alertmanager_smtp: needs both username and password_file": {"alertmanager_smtp": {"smarthost": "m:25", "from": "a@b", "username": "x"}},
    "alertmanager_receivers: b get no alerts: a, the first without matchers": receivers({"name": "a"}, {"name": "b"}),
    "alertmanager_receivers: /nonexistent/slack is not on the control host": receivers({"name": "a", "slack_url_file": "/nonexistent/slack", "slack_channel": "#a"}),
    "grafana_database: postgres needs host, name, user, password_file": {"grafana_database": {"type": "postgres"}},
    "grafana_source: deb needs grafana_file_url and grafana_file_sha256": {"grafana_source": "deb"},
    "grafana_contact_points: 2 items have the name a: rename one": {"grafana_contact_points": [{"name": "a", "webhook_url": "https://x"}] * 2},
    "k3s_version (k2): 1.34.2 is not one of k3s_checksums (v1.34.2+k3s1); did you mean v1.34.2+k3s1?": {"k3s_version": "1.34.2"},
    "k3s_config.cluster-cidr (k1): 10.42.0.0/33 is not a network": {"k3s_config": {"cluster-cidr": "10.42.0.0/33"}},
    "k3s_config.cluster-cidr (k1): pods is not a network": {"k3s_config": {"cluster-cidr": "pods"}},
    "k3s_config.cluster-cidr (k3): 10.99.0.0/16, but k1 has 10.42.0.0/16: set it for all servers": {
        "groups": {"k3s_server": ["k1", "k3", "k4"]}, "per_host": {"k3": {"k3s_config": {"cluster-cidr": "10.99.0.0/16"}}}},
    "k3s_config.cluster-dns (k1): 10.99.0.10 is not in service-cidr (10.43.0.0/16)": {"k3s_config": {"cluster-dns": "10.99.0.10"}},
    "firewall_extra: 10.0.0.0/33 is not an address or network": opened("80", source="10.0.0.0/33"),
    "firewall_extra: x: from is empty, which means nobody: list some, or remove it for all": {"firewall_extra": [{"what": "x", "ports": ["80"], "from": []}]},
    "firewall_extra: x: ports is empty, which means all of them: list some": opened(),
    "ictx_mlflow_uri: localhost means the local machine on every host: use a name or address": {"ictx_mlflow_uri": "https://localhost:30500"},
    "artifacts_mirror: 127.0.0.1 means the local machine on every host": {"artifacts_mirror": "http://127.0.0.1:8081/x"},
    "ictx_registry: localhost means the local machine on every host": {"ictx_registry": "localhost:5000", "ictx_registry_external": {}},
    "ictx_registry_mirror_of: r.example.org:5000 is ictx_registry itself": {"ictx_registry": "r.example.org:5000", "ictx_registry_mirror_of": ["docker.io", "r.example.org:5000"]},
    "ictx_serving_releases: has no effect: the group k3s_server is empty": {"groups": {"k3s_server": [], "k3s_agent": []}, "ictx_serving_releases": [{"name": "a", "model": "m"}]},
    "alertmanager_receivers: have no effect: the group alertmanager is empty": {"groups": {"alertmanager": []}, **receivers({"name": "a"})},
    "alertmanager_group_by: ... stands for all labels": {"alertmanager_group_by": ["...", "alertname"]},
    "grafana_database: /nonexistent/g is not on the control host": {"grafana_database": {"type": "postgres", "host": "db:5432", "name": "g", "user": "g", "password_file": "/nonexistent/g"}},
    "k3s_version (k2): v1.35.0+k3s1 is newer than the servers' (v1.34.2+k3s1)": {"per_host": {"k2": {"k3s_version": "v1.35.0+k3s1", "k3s_checksums": {"v1.35.0+k3s1": {}}}}},
    "firewall_extra: x: 70000 must be ports from 1 to 65535": opened("70000"),
    "firewall_extra: x: 2000-1000 must be ports from 1 to 65535, the lower first": opened("2000-1000"),
    "nvidia_driver_version: 580.95.05 needs nvidia_driver_source: nvidia": {"nvidia_driver_source": "distribution", "nvidia_driver_version": "580.95.05"},
    "common_apt_pins: an item has no packages": {"common_apt_pins": [{"packages": [], "version": "1"}]},
}  # fmt: skip


@pytest.mark.parametrize("given", RIGHT.values(), ids=RIGHT)
def test_what_is_right_passes(given: dict[str, Any]) -> None:
    assert found(**given) == []


@pytest.mark.parametrize(("text", "given"), WRONG.items())
def test_what_would_fail_later_is_named_with_what_to_do(text: str, given: dict[str, Any]) -> None:
    lines = found(**given)
    assert [line for line in lines if line.startswith(text)], lines


TIMES = [
    "daily",
    "Sat 22:30",
    "*-*-* 02:30:00",
    "Mon..Fri *:0/15",
    "*-*-1..7 18:00",
    "02:30",
    "*-*~03",
    "Mon,Tue 02:30 UTC",
    "2026-12-24 18:00",
]
NO_TIMES = ["nightly", "25:30", "30 2 * * *", "02:70", "Mon Tue 02:30", "at 02:30", "*-*-* 24:00", "every day"]


def test_times_are_those_of_systemd() -> None:
    assert [time for time in TIMES if not storage._is_calendar(time)] == []
    assert [time for time in NO_TIMES if storage._is_calendar(time)] == []
    if program := shutil.which("systemd-analyze"):
        codes = [
            subprocess.run([program, "calendar", time], capture_output=True, check=False).returncode
            for time in [*TIMES, *NO_TIMES]
        ]
        assert [bool(code) for code in codes] == [False] * len(TIMES) + [True] * len(NO_TIMES)
