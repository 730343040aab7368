# ruff: noqa: E501 (tables of values)
"""Preflight accepts values in the format of the programs that read them, and rejects values that would fail later."""

from __future__ import annotations

from typing import Any

import pytest
from test_hostile_values import refused

DIGEST = "sha256:" + "a" * 64
SMTP = {"smarthost": "mail.example.org:25", "from": "ictx@example.org"}


def gres(count: Any) -> list[dict[str, Any]]:
    return [{"name": "gpu", "type": "a100", "count": count}]


def folder(mode: Any) -> list[dict[str, Any]]:
    return [{"path": "data", "mode": mode}]


def receiver(**parts: Any) -> list[dict[str, Any]]:
    return [{"name": "ops", **parts}]


def group(**parts: Any) -> list[dict[str, Any]]:
    return [{"name": "a", "nodes": "n1", **parts}]


def named(**parts: Any) -> list[dict[str, Any]]:
    return [{"name": "a", **parts}]


def target(address: Any) -> list[dict[str, Any]]:
    return [{"name": "a", "targets": [{"address": address}]}]


# fmt: off
RIGHT: dict[str, list[Any]] = {
    "alertmanager_group_by": [["alertname"], ["..."]], "alertmanager_group_wait": ["0s", "1m30s"],
    "alertmanager_listen": [":9093", "192.0.2.1:9093", "[fd00::1]:65535"],
    "alertmanager_receivers": [
        receiver(email_to="Ops <ops@example.org>, b@example.org"),
        receiver(matchers=['severity="critical"', "team=~a|b", 'x != "a \\" b"', "empty="]),
    ],
    "alertmanager_repeat_interval": ["4h", "1d12h"], "alertmanager_smtp": [SMTP, {**SMTP, "smarthost": "[fd00::1]:587"}],
    "backup_check_read_data": ["5%", "0.5%", "100%", "1/7", "10G", ""], "backup_on_calendar": ["*-*-* 02:30:00", "daily"],
    "backup_timeout_seconds": [60], "container_engine_log_max_size": ["10m", "1GB"], "grafana_version": ["11.6.0", "12.0.1+security-01"],
    "ictx_mlflow_uri": ["https://[fd00::1]:30500", "https://mlflow.example.org/ictx"], "ictx_registry_mirror_of": [["docker.io", "quay.io:443"]],
    "ictx_serving_names": [["models.example.org", "192.0.2.7", "fd00::7"]], "ictx_serving_releases": [named(version=1)],
    "ictx_serving_timeout_minutes": [1], "ictx_users": [[{"name": "shadowfax", "uid": 2001}]],
    "image_bake_base": [{"image": f"nvcr.io/nvidia/cuda:13.0@{DIGEST}"}],
    "image_bake_python": ["3.11"], "journal_max_days": [1], "journal_max_size": ["20G", "500M", "1000000"],
    "k3s_etcd_snapshot_retention": [1], "k3s_etcd_snapshot_schedule": ["0 */12 * * *"],
    "k3s_node_labels": [["gpu=a100", "example.org/rack=r1", "node.kubernetes.io/instance-type=big", "a="]],
    "k3s_node_taints": [["gpu=true:NoSchedule", "gpu:NoExecute", "example.org/a=:PreferNoSchedule"]],
    "nvidia_driver_branch": ["580"], "nvidia_driver_mig": [[{"gpus": [0], "profiles": ["3g.40gb", "1g.10gb+me"]}]],
    "nvidia_driver_version": ["", "580.95.05", "580.95.05-1", "570.124"],
    "prometheus_extra_scrapes": [target("h1.example.org:9100"), [{"name": "a", "targets": [], "path": "/x/metrics", "interval": "1m"}]],
    "prometheus_interval": ["15s"], "prometheus_retention_size": ["20GB", "512MiB"], "prometheus_retention_time": ["30d", "1y6w", "1h30m"],
    "registry_user": ["ictx", "robot$a+b"], "slurm_accounts": [named(fairshare="parent"), named(fairshare=5), named(max_wall="1-0")],
    "slurm_credential_seconds": [120], "slurm_first_job_id": [1, 67043327], "slurm_gres": [gres(1)], "slurm_health_interval": [1, 65533],
    "slurm_jobs_cpus_per_node": [1], "slurm_jobs_nodes": [1], "slurm_jobs_shm_size": ["50%", "100%", "8g", "8G"],
    "slurm_jobs_sweep_workers": [1], "slurm_jobs_time": ["1:00:00", "0-1", "90", "UNLIMITED"], "slurm_kill_wait": [0, 65533],
    "slurm_node_groups": [group(sockets=1, cores_per_socket=1, threads_per_core=1, memory_mb=1, weight=0)],
    "slurm_partitions": [named(priority_tier=65533, max_time="30", grace_seconds=0)],
    "slurm_propagate_limits": ["ALL", "NONE", "MEMLOCK,NOFILE"], "slurm_qos": [named(max_wall="1:00")],
    "slurmdbd_purge_after": ["24month", "NONE", "10days"], "storage_folders": [folder("0755"), folder("1775")],
    "artifacts_from": ["", "http://m.example.org:8081"], "artifacts_mirror": ["", "http://m.example.org:8081", "https://m.example.org/ictx"],
    "k3s_mirror": ["https://m.example.org/k3s"], "lab_mirror": ["", "http://m.example.org/debian", "file:///srv/debian", "copy:/srv/debian"],
    "nvidia_driver_repository_key": ["", "https://m.example.org/key.pub"], "storage_nfs_server": ["", "nas1", "fd00::1"],
    "slurm_jobs_mlflow_uri": ["https://m.example.org", "sqlite:////shared/mlflow.db", "postgresql+psycopg2://db/mlflow", "/shared/mlflow"],
    "firewall_undo_seconds": [20, 90], "helm_release_timeout_minutes": [1], "ictx_validate": [{"pair_share": 0.85, "kernel_share": 1}, {"clock_ms": 0.5, "failed_connections": 0, "pair_share": 0}],
    "image_bake_cache_gb": [0], "image_bake_keep": [1], "k3s_audit_days": [1], "k3s_forget_seconds": [5], "k3s_open_files": [8192],
    "slurm_jobs_requeue_limit": [0], "slurm_slurmd_timeout": [0], "slurm_exporter_interval": [1],
    "slurm_associations": [[{"user": "alice", "account": "a", "max_tres_per_job": {"gres/gpu:a100": 4, "gres/gpu:a100_3g.20gb": 1, "cpu": 8}}]],
}
WRONG: dict[str, list[Any]] = {
    "alertmanager_group_by": [["cluster-name"], ["1a"]], "alertmanager_group_wait": [30, "30", "1m1h", "fast"],
    "alertmanager_listen": [":0", ":65536", "h:99999"],
    "alertmanager_receivers": [
        receiver(email_to="ops"), receiver(matchers=["critical"]), receiver(matchers=['severity=critical"']),
        receiver(matchers=["severity==critical x"]), receiver(webhook_url="https://x.example.org:70000/"),
    ],
    "alertmanager_repeat_interval": ["4hours", "0s", 4],
    "alertmanager_smtp": [{**SMTP, "smarthost": "mail.example.org"}, {**SMTP, "from": "ictx"}, {**SMTP, "smarthost": "a:0"}],
    "backup_check_read_data": ["500%", "0%", "5", "half"], "backup_on_calendar": [1350], "backup_timeout_seconds": [0],
    "container_engine_log_max_size": ["0", "10 m", "10X"], "grafana_version": ["11", "11.6", "latest"],
    "ictx_mlflow_uri": ["https://mlflow.example.org:99999"], "ictx_proxy": [{"http": "http://p.example.org:0"}],
    "ictx_registry": ["a.example.org:99999"], "ictx_registry_mirror_of": [["https://docker.io"], ["docker.io/library"]],
    "ictx_serving_names": [["https://models.example.org"], ["a:8000"]], "ictx_serving_releases": [named(version=0)],
    "ictx_serving_timeout_minutes": [0],
    "ictx_users": [[{"name": name, "uid": 2001}] for name in ("sudo", "shadow", "ictx-tls", "docker", "disk", "video", "k3s")],
    "image_bake_base": [{"image": "nvcr.io/nvidia/cuda:13.0"}, {"image": "nvcr.io/nvidia/cuda@sha256:abc"}],
    "image_bake_python": ["2.7", "3", "3.9", 3.1, "3.12.1"], "journal_max_days": [0], "journal_max_size": ["20GB", "0", "20 G"],
    "k3s_etcd_snapshot_retention": [0], "k3s_etcd_snapshot_schedule": [720],
    "k3s_node_labels": [["gpu"], ["node-role.kubernetes.io/gpu=true"], ["a=b/c"], ["kubernetes.io/x=y"], ["k8s.io/x=y"], ["a=" + "x" * 64]],
    "k3s_node_taints": [["gpu=true"], ["gpu=true:NoScheduled"], [":NoSchedule"]],
    "nvidia_driver_branch": ["latest", "58", "580.95"], "nvidia_driver_mig": [[{"profiles": ["big"]}], [{"profiles": ["8g.80gb"]}]],
    "nvidia_driver_version": ["580", "latest"],
    "prometheus_extra_scrapes": [target("h1.example.org:99999"), [{"name": "a", "targets": [], "path": "metrics"}],
                                 [{"name": "a", "targets": [], "interval": "15"}]],
    "prometheus_interval": [15, "15", "0s"], "prometheus_retention_size": ["20G", 20, "20", "0GB"],
    "prometheus_retention_time": ["30days", "12h3d", "30", "0d", 30], "registry_user": ["a:b"],
    "slurm_accounts": [named(fairshare="half"), named(fairshare="-5"), named(max_wall="0"), named(max_wall="00:00:00")],
    "slurm_credential_seconds": [0], "slurm_first_job_id": [0, 70000000], "slurm_gres": [gres(0)], "slurm_health_interval": [0, 70000],
    "slurm_jobs_cpus_per_node": [0], "slurm_jobs_nodes": [0], "slurm_jobs_shm_size": ["50", "8GB", "0%", "101%"],
    "slurm_jobs_stages": [{"sft": {"config": "a", "after": "pretrain", "time": "0"}}],
    "slurm_jobs_sweep_workers": [0], "slurm_jobs_time": ["0", "00:00:00", "0-0"], "slurm_kill_wait": [65534],
    "slurm_measured_nodes": [[{"nodes": "n1", "cpus": 0}], [{"nodes": "n1", "memory_mb": 0}]],
    "slurm_node_groups": [group(cpus=0), group(memory_mb=0), group(sockets=0), group(threads_per_core=0), group(gres=gres(0))],
    "slurm_partitions": [named(priority_tier=70000), named(max_time="0"), named(max_time="0:00:00")],
    "slurm_propagate_limits": ["MEMLOK", "MEMLOCK NOFILE"], "slurm_qos": [named(max_wall="0")], "slurm_slurmd_timeout": [70000],
    "slurmdbd_innodb_buffer_pool_mb": [0], "slurmdbd_purge_after": ["0", "0month"], "storage_folders": [folder(0o644), folder("rw")],
    "storage_user_folders": [folder(0o770)],
    "artifacts_from": ["/srv/mirror", "ftp://m.example.org"], "artifacts_mirror": ["ftp://m.example.org", "m.example.org", "/srv/mirror", "s3://mirror"],
    "k3s_mirror": ["ftp://m.example.org", "github.com/k3s"], "prometheus_mirror": ["rsync://m.example.org"], "lab_mirror": ["ftp://m.example.org", "m.example.org"],
    "kube_lab_mirror": ["rsync://m.example.org/debian"], "nvidia_driver_repository_key": ["/root/key.pub"], "storage_nfs_server": ["nas1:/export", "nfs://nas1"],
    "slurm_jobs_mlflow_uri": ["ftp://m.example.org", "m.example.org", "s3://runs"],
    "firewall_undo_seconds": [0, 5], "helm_release_timeout_minutes": [0], "ictx_validate": [{"pair_share": 85}, {"kernel_share": 1.01}, {"clock_ms": 0}, {"round_trip_ms": 0}],
    "image_bake_keep": [0], "journal_metrics_interval": [0], "k3s_audit_days": [0], "k3s_forget_seconds": [0], "k3s_open_files": [0],
    "kube_lab_build_timeout": [0], "registry_exporter_interval": [0], "slurm_exporter_group_id": [0], "slurm_exporter_interval": [0],
    "slurm_associations": [[{"user": "alice", "account": "a", "max_tres_per_job": {"gres/gpu:": 4}}], [{"user": "alice", "account": "a", "max_tres_per_job": {"gres/gpu:a=b": 4}}]],
}
# fmt: on


@pytest.mark.parametrize("name", RIGHT)
def test_what_the_program_reads_is_accepted(name: str) -> None:
    assert {str(value): refused(name, value) for value in RIGHT[name] if refused(name, value)} == {}


@pytest.mark.parametrize("name", WRONG)
def test_what_the_program_would_refuse_is_refused_by_name(name: str) -> None:
    assert [value for value in WRONG[name] if not refused(name, value)] == []
