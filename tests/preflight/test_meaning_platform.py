# ruff: noqa: E501 (each problem is one line, as users see it)
"""Inconsistent services, folders, releases and units are rejected, each in one line with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from altered_lab import found
from cluster import ROOT
from programs import loaded

monitoring = loaded(ROOT / "playbooks/plugins/filter/meaning_monitoring.py")


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
        "ictx_registry: registry.example.org:443 must end with the port 5000 (registry_port)",
        f"ictx_registry: registry.example.org is not a name of svc1, so that its certificate does not contain it: use one of {names}, "
        "or add it to registry_hosts",
        "ictx_state_dir: /shared/state contains secrets, but is on shared storage (/shared): move it",
        "ictx_cache_dir: /usr/ belongs to the system: use a separate folder, such as /usr/ictx",
        "ictx_backup_repository: is not set, but ictx_backup is true: set it to a restic repository",
        "ictx_mlflow_uri: its port is 30500, but MLflow's nodePort is 30800",
        "ictx_serving_values: service.nodePort 30800 is also used by ictx_mlflow_values",
        "storage_nfs_clients: is empty, so that no node can mount the export: add the nodes' networks",
        "nvidia_driver_version: 570.1.2 does not belong to nvidia_driver_branch 580",
        "prometheus_listen (svc1): alertmanager_listen also listens on port 9090",
        "prometheus_runbook_url: must be a URL where receivers of alerts can open docs/runbooks, such as "
        "https://git.example.org/docs",
        "alertmanager_receivers: watchdog has slack_url_file, and needs slack_channel",
        "alertmanager_receivers: ops needs webhook_url, slack_url_file or email_to",
        "alertmanager_receivers: mail has email_to, which needs alertmanager_smtp",
        "alertmanager_receivers: 2 items have the name mail",
        "alertmanager_receivers: /x is not on the control host: copy it there",
        "alertmanager_receivers: mail and mail get no alerts: ops, the first without matchers, gets all; add matchers",
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
            "ictx_serving_releases: a: service.nodePort 30800 is also used by ictx_serving_values",
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
    assert {scrape["name"] for scrape in named} == set(monitoring.OWN_JOBS)

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
        f"{native}: 2 jobs have the name node, one of the platform's: rename one",
        f"{native}: 2 jobs have the name http: rename one",
        f"{native}: each item needs a job_name",
        f"{native}: none has no targets: add static_configs, or one of the *_sd_configs",
        "prometheus_extra_scrapes: 2 jobs have the name dcgm, one of the platform's: rename one",
    }


@pytest.mark.parametrize(
    ("ours", "external", "lines"),
    [
        (True, {}, {"ictx_registry_external: has no effect: svc1 in the group registry runs one: empty the group, or remove this"}),
        (
            False,
            None,
            {
                "group registry: has no host: add one, or set ictx_registry_external to the credentials of ictx_registry "
                "({} without any)"
            },
        ),
        (False, {}, set()),
        (
            False,
            {"user": "robot$ictx+pull", "push_password_file": "/nonexistent/push", "ca_file": "/nonexistent/ca.crt"},
            {
                "ictx_registry_external: needs both user and password_file, or neither",
                "ictx_registry_external: needs both push_user and push_password_file, or neither",
                "ictx_registry_external: push_password_file /nonexistent/push is not on the control host: copy it there",
                "ictx_registry_external: ca_file /nonexistent/ca.crt is not on the control host: copy it there",
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
        "ictx_mlflow_oidc: ca_file /nonexistent/ca.crt is not on the control host: copy it there",
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
        "ictx_unit_dropins: slurmdb is not a unit of the platform; did you mean slurmdbd?",
        "ictx_unit_dropins: squid is not a unit of the platform",
        "ictx_unit_dropins: slurmctld has the section LimitNOFILE, which must be Unit or Service",
        "ictx_unit_dropins: slurmctld Service must be a dictionary of directives, such as {LimitNOFILE: 1048576}",
        "ictx_unit_dropins: munge must be a dictionary of sections, such as {Service: {LimitNOFILE: 1048576}}",
        "ictx_unit_dropins: docker Service Environment ends with a backslash, which would join the next line",
        "ictx_unit_dropins: k3s Service has limit, which is not a valid name of a directive",
        "ictx_unit_dropins: k3s Service Nice must be text, a number or a list of them",
        "ictx_unit_dropins: k3s has the section Install, which must be Unit or Service",
    }
