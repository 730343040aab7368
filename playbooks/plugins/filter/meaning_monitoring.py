"""Ansible filter: rules of preflight (meaning.py) about Prometheus, Alertmanager and Grafana."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

Problem = tuple[str, str, str]

MODULES = ("http", "https", "tcp")
SCRAPE_KEYS = (
    "job_name", "scrape_interval", "scrape_timeout", "metrics_path", "scheme", "params", "honor_labels",
    "basic_auth", "honor_timestamps", "static_configs", "relabel_configs", "metric_relabel_configs",
    "authorization", "oauth2", "tls_config", "proxy_url", "follow_redirects", "enable_http2", "sample_limit",
    "label_limit", "target_limit", "body_size_limit", "label_name_length_limit", "label_value_length_limit",
    "scrape_protocols", "file_sd_configs", "http_sd_configs", "dns_sd_configs", "kubernetes_sd_configs",
    "consul_sd_configs", "ec2_sd_configs", "no_proxy", "keep_dropped_targets", "track_timestamps_staleness",
    "proxy_from_environment", "enable_compression"
)  # fmt: skip
DURATION = re.compile(r"(\d+(ms|[ywdhms]))+")
# Those of playbooks/monitoring.yml.
OWN_JOBS = ("node", "mysqld", "dcgm", "blackbox", "prometheus", "alertmanager", "endpoints", "mlflow-endpoints")


def monitoring(site: Any) -> Iterator[Problem]:
    """Targets are valid, alerts can be sent, and files of the control host exist."""
    interval = str(site.get("prometheus_interval") or "15s")
    seconds = sum(
        int(n) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}.get(u, 86400)
        for n, u in re.findall(r"(\d+)(ms|[a-z])", interval)
    )
    if not 10 <= seconds <= 120:
        text = f"{interval} must be from 10s (the scrape timeout) to 2m (alerts evaluate 5 minutes)"
        yield "prometheus_interval", text, ""
    where = "prometheus_extra_scrapes"
    for scrape in site.get(where) or []:
        module = scrape.get("module")
        if module and module not in MODULES:
            yield where, f"{scrape['name']}: module {module} does not exist; known modules: {', '.join(MODULES)}", ""
        for target in scrape["targets"]:
            at = str(target.get("address") or "")
            if not at:
                yield where, f"{scrape['name']} has a target without address: add it, as HOST:PORT", ""
            elif not module and ("/" in at or not re.search(r":\d+$", at)):
                yield where, f"{scrape['name']}: {at} must be HOST:PORT; the path goes into path", ""
            elif module == "tcp" and ("/" in at or not re.search(r":\d+$", at)):
                yield where, f"{scrape['name']}: {at} must be HOST:PORT for the module tcp", ""
            elif module in ("http", "https") and not re.match(r"https?://", at if "://" in at else "http://"):
                yield where, f"{scrape['name']}: {at} must be http:// or https:// for the module {module}", ""
    for job in site.get("prometheus_extra_scrape_configs") or []:
        yield from _native(job)
    for write in site.get("prometheus_remote_write") or []:
        if bool(write.get("user")) != bool(write.get("password_file")):
            yield "prometheus_remote_write", f"{write['url']} needs both user and password_file, or neither", ""
    labels = site.get("alertmanager_group_by") or []
    if "..." in labels and len(labels) > 1:
        yield "alertmanager_group_by", "... stands for all labels: remove the others", ""
    for label, count in Counter(site.get("alertmanager_group_by") or []).items():
        if count > 1:
            yield "alertmanager_group_by", f"has {label} {count} times: keep it once", ""
    smtp = site.get("alertmanager_smtp") or {}
    for key in ("smarthost", "from"):
        if smtp and not smtp.get(key):
            yield "alertmanager_smtp", f"needs {key}", ""
    if bool(smtp.get("username")) != bool(smtp.get("password_file")):
        yield "alertmanager_smtp", "needs both username and password_file, or neither", ""
    receivers = site.get("alertmanager_receivers") or []
    rest = [receiver["name"] for receiver in receivers if "matchers" not in receiver and receiver["name"] != "watchdog"]
    if len(rest) > 1:
        text = f"{' and '.join(rest[1:])} get no alerts: {rest[0]}, the first without matchers, gets all; add matchers"
        yield "alertmanager_receivers", text, ""
    files = [("prometheus_rules_files", str(file)) for file in site.get("prometheus_rules_files") or []]
    files += [("alertmanager_smtp", smtp["password_file"])] if smtp.get("password_file") else []
    database = site.get("grafana_database") or {}
    files += [("grafana_database", database["password_file"])] if database.get("password_file") else []
    files += [("alertmanager_receivers", one["slack_url_file"]) for one in receivers if one.get("slack_url_file")]
    for where, file in files:
        if not Path(file).is_file():
            yield where, f"{file} is not on the control host: copy it there", ""


def _native(job: Mapping[str, Any]) -> Iterator[Problem]:
    where, name = "prometheus_extra_scrape_configs", str(job.get("job_name") or "a job")
    for key in job:
        if key not in SCRAPE_KEYS and (near := get_close_matches(key, SCRAPE_KEYS, n=1, cutoff=0.85)):
            yield where, f"{name}: Prometheus has no {key}; did you mean {near[0]}?", ""
    for key in ("scrape_interval", "scrape_timeout"):
        if key in job and not DURATION.fullmatch(str(job[key])):
            yield where, f"{name}: {key} is {job[key]}, must have a unit, such as 30s", ""
    for static in job.get("static_configs") or []:
        targets = static.get("targets")
        if not isinstance(targets, Sequence) or isinstance(targets, str):
            yield where, f"{name}: targets must be a list, such as ['192.0.2.1:9100']", ""
            continue
        for target in map(str, targets):
            if "/" in target and not job.get("relabel_configs"):
                yield where, f"{name}: {target} must be HOST:PORT; the rest goes into scheme and metrics_path", ""


def scrapes(site: Any) -> Iterator[Problem]:
    """Jobs of Prometheus have unique names and targets."""
    native = [{"job_name": "", **job} for job in site.get("prometheus_extra_scrape_configs", [])]
    if not all(job["job_name"] for job in native):
        yield "prometheus_extra_scrape_configs", "each item needs a job_name", ""
    names = [*OWN_JOBS, *(scrape["name"] for scrape in site.get("prometheus_extra_scrapes", []))]
    for name, count in Counter([*names, *(job["job_name"] for job in native)]).items():
        if name and count > 1:
            text = f"{count} jobs have the name {name}" + (", one of the platform's" if name in OWN_JOBS else "")
            where = "_scrape_configs" if name in (job["job_name"] for job in native) else "_scrapes"
            yield f"prometheus_extra{where}", f"{text}: rename one", ""
    for job in native:
        if not any(key == "static_configs" or key.endswith("_sd_configs") for key in job):
            text = f"{job['job_name']} has no targets: add static_configs, or one of the *_sd_configs"
            yield "prometheus_extra_scrape_configs", text, ""


def receivers(site: Any) -> Iterator[Problem]:
    """Alerts have valid receivers."""
    given = site.get("alertmanager_receivers") or []
    if given and site.groups.get("alertmanager") == []:
        text = "have no effect: the group alertmanager is empty: add a host, or remove them"
        yield "alertmanager_receivers", text, ""
    for name, count in Counter(str(receiver["name"]) for receiver in given).items():
        if count > 1 or name == "nobody":
            text = f"{count} items have the name {name}" if count > 1 else "the name nobody is reserved"
            yield "alertmanager_receivers", text, ""
    for receiver in given:
        name, kinds = receiver["name"], [
            key for key in ("webhook_url", "slack_url_file", "email_to") if receiver.get(key)
        ]
        if not kinds:
            yield "alertmanager_receivers", f"{name} needs webhook_url, slack_url_file or email_to", ""
        if receiver.get("slack_url_file") and not receiver.get("slack_channel"):
            yield "alertmanager_receivers", f"{name} has slack_url_file, and needs slack_channel", ""
        if not str(site.get("prometheus_runbook_url", "")).startswith(("https://", "http://")):
            text = (
                "must be a URL where receivers of alerts can open docs/runbooks, such as https://git.example.org/docs"
            )
            yield "prometheus_runbook_url", text, ""
        if receiver.get("email_to") and not site.get("alertmanager_smtp"):
            yield "alertmanager_receivers", f"{name} has email_to, which needs alertmanager_smtp", ""


def grafana(site: Any) -> Iterator[Problem]:
    """Grafana has all settings that its source and database need."""
    database, source = site.get("grafana_database") or {}, site.get("grafana_source")
    lacking = [key for key in ("host", "name", "user", "password_file") if not database.get(key)]
    if database.get("type") == "postgres" and lacking:
        yield "grafana_database", f"postgres needs {', '.join(lacking)}", ""
    if source in ("deb", "tarball") and not (site.get("grafana_file_url") and site.get("grafana_file_sha256")):
        yield "grafana_source", f"{source} needs grafana_file_url and grafana_file_sha256", ""
    for name, count in Counter(str(point["name"]) for point in site.get("grafana_contact_points") or []).items():
        if count > 1:
            yield "grafana_contact_points", f"{count} items have the name {name}: rename one", ""


def rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return (monitoring, scrapes, receivers, grafana)


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"meaning_monitoring": rules}
