"""Ansible filter: rules of preflight (meaning.py) about storage, backups, monitoring, Kubernetes and the firewall."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

Problem = tuple[str, str, str]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# What is there only until the next start, or whose folders others made.
TAKEN = re.compile(
    r"/(boot|dev|etc|root|run|sys|tmp)(/.*)?|/opt(/ictx(/.*)?)?|/(bin|home|lib|lib64|sbin|usr|var|var/lib|var/log|var/tmp)"
)
FOLDERS = ("bundles", "data", "images", "runs")
KEPT = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
NAMED = "minutely|hourly|daily|weekly|monthly|quarterly|semiannually|yearly|annually"
DAY = "(mon(day)?|tue(sday)?|wed(nesday)?|thu(rsday)?|fri(day)?|sat(urday)?|sun(day)?)"
NUMBER = r"(\*|\d+)((,|\.\.)\d+)*(/\d+)?"
HOUR, MINUTE = (rf"(\*|{one}((,|\.\.){one})*)(/\d+)?" for one in (r"([01]?\d|2[0-3])", r"[0-5]?\d"))
# Parts of a time of systemd's calendar, in their order; each may be left out.
CALENDAR = (
    rf"{DAY}((,|\.\.|-){DAY})*",
    rf"({NUMBER}-)?{NUMBER}[-~]{NUMBER}",
    rf"{HOUR}:{MINUTE}(:{MINUTE}(\.\d+)?)?",
    r"UTC|[A-Z][A-Za-z]+(/[A-Za-z_+-]+)+",
)
CRON = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
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


def _network(text: str) -> Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _wrong_networks(where: str, given: Sequence[Any]) -> Iterator[Problem]:
    for text in map(str, given):
        if re.fullmatch(r"[0-9./]+|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(/\d+)?", text) and not _network(text):
            yield where, f"{text} is no address or network: write it as 192.0.2.0/24 or fd00::/64", ""


def storage(site: Any) -> Iterator[Problem]:
    """Compute and login nodes may mount the export, to write; its folders are those that the platform uses."""
    clients = site.get("storage_nfs_clients") or []
    yield from _wrong_networks("storage_nfs_clients", clients)
    networks = [_network(str(client)) for client in clients]
    if site.hosts("storage_server") and site.get("storage_type") == "nfs" and clients and all(networks):
        for host in dict.fromkeys([*site.hosts("slurm_compute"), *site.hosts("slurm_login")]):
            at = _network(site.address(host))
            alike: list[Any] = [net for net in networks if net and at and net.version == at.version]
            if at and alike and not any(at.subnet_of(net) for net in alike):
                text = f"has no network of {host} ({site.address(host)}), which could not mount the export: add it"
                yield "storage_nfs_clients", text, ""
                break
    for option in {"ro", "suid", "dev"} & {str(option) for option in site.get("storage_nfs_options") or []}:
        right = {"ro": "rw", "suid": "nosuid (the role's)", "dev": "nodev (the role's)"}[option]
        yield "storage_nfs_options", f"{option} contradicts {right}: take it out", ""
    given = site.get("storage_folders")
    there = [str(folder["path"]).rstrip("/") for folder in given or []]
    if given is not None and (lacking := [name for name in FOLDERS if name not in there]):
        yield "storage_folders", f"lacks {', '.join(lacking)}, which the platform uses: add the role's own to yours", ""
    for folder in site.get("storage_user_folders") or []:
        if given is not None and str(folder["path"]).rstrip("/") not in there:
            yield "storage_user_folders", f"{folder['path']} is not one of storage_folders: add it there", ""


def folders(site: Any) -> Iterator[Problem]:
    """Folders are the platform's own, and last."""
    shared = str(site.get("ictx_shared_dir") or "").rstrip("/")
    for name in ("storage_nfs_export", "prometheus_storage_dir", "registry_storage_dir", "ictx_backup_repository"):
        folder = str(site.get(name) or "")
        if folder.startswith("/") and TAKEN.fullmatch(folder.rstrip("/") or "/"):
            text = f"{folder} is the system's, or lost at a reboot: take a folder of its own, such as /srv/ictx"
            yield name, text, ""
    for name in ("prometheus_storage_dir", "storage_nfs_export"):
        folder = str(site.get(name) or "")
        if shared and f"{folder}/".startswith(f"{shared}/"):
            export = name == "storage_nfs_export"
            what = "where its clients mount it" if export else "a network file system, where it would be damaged"
            yield name, f"{folder} is on the shared directory ({shared}), {what}: take a folder of a local disk", ""
    state, backup = (str(site.get(f"ictx_{name}") or "") for name in ("state_dir", "backup_repository"))
    if state and backup and f"{backup}/".startswith(f"{state.rstrip('/')}/"):
        yield "ictx_backup_repository", f"{backup} is in ictx_state_dir, and lost with it: take another disk", ""


def backups(site: Any) -> Iterator[Problem]:
    """Backups are made at a time that there is, of folders with names, and some are kept."""
    keep = site.get("backup_keep")
    for name in keep or {}:
        if name not in KEPT:
            yield "backup_keep", f"has {name}, which restic does not know: take {', '.join(KEPT)}", ""
    if keep is not None and not any(int(number) for number in keep.values()):
        yield "backup_keep", "keeps nothing: keep some, as {daily: 7}", ""
    for name, path in (site.get("backup_extra_paths") or {}).items():
        if not re.fullmatch("[a-z0-9][a-z0-9-]*", name):
            yield "backup_extra_paths", f"{name} must be a name of small letters, digits or '-'", ""
        if not re.fullmatch("/[^/].*", str(path)):
            yield "backup_extra_paths", f"{name}: {path} must be an absolute path", ""
    when = str(site.get("backup_on_calendar") or "")
    if when and not _is_calendar(when):
        text = f"{when} is no time of systemd's calendar: write it as daily, '*-*-* 02:30:00' or 'Sat 22:30'"
        yield "backup_on_calendar", text, ""
    schedule = str(site.get("k3s_etcd_snapshot_schedule") or "")
    if schedule and not schedule.startswith("@") and not _is_cron(schedule):
        yield "k3s_etcd_snapshot_schedule", f"{schedule} is no time of cron: write it as '0 */12 * * *'", ""


def _is_calendar(text: str) -> bool:
    words = text.split()
    if re.fullmatch(NAMED, words[0], re.IGNORECASE):
        words[0] = "Mon"
    for part in CALENDAR:
        if words and re.fullmatch(part, words[0], re.IGNORECASE):
            words = words[1:]
    return not words


def _is_cron(text: str) -> bool:
    fields = text.split()
    if len(fields) != len(CRON):
        return False
    for field, (low, high) in zip(fields, CRON, strict=True):
        for part in field.split(","):
            found = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?|[A-Za-z]{3}(?:-[A-Za-z]{3})?)(?:/(\d+))?", part)
            if (
                not found
                or found[3] == "0"
                or not all(low <= int(number) <= high for number in found.groups()[:2] if number)
            ):
                return False
    return True


def monitoring(site: Any) -> Iterator[Problem]:
    """Targets can be found, alerts are sent, and files of the control host are there."""
    interval = str(site.get("prometheus_interval") or "15s")
    seconds = sum(
        int(n) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}.get(u, 86400)
        for n, u in re.findall(r"(\d+)(ms|[a-z])", interval)
    )
    if not 10 <= seconds <= 120:
        text = f"{interval} must be from 10s (a scrape's timeout) to 2m (alerts look at 5 minutes)"
        yield "prometheus_interval", text, ""
    where = "prometheus_extra_scrapes"
    for scrape in site.get(where) or []:
        module = scrape.get("module")
        if module and module not in MODULES:
            yield where, f"{scrape['name']}: there is no module {module}, only {', '.join(MODULES)}", ""
        for target in scrape["targets"]:
            at = str(target.get("address") or "")
            if not at:
                yield where, f"{scrape['name']} has a target without address: add it, as HOST:PORT", ""
            elif not module and ("/" in at or not re.search(r":\d+$", at)):
                yield where, f"{scrape['name']}: {at} must be HOST:PORT; the path goes into path", ""
    for job in site.get("prometheus_extra_scrape_configs") or []:
        yield from _native(job)
    for write in site.get("prometheus_remote_write") or []:
        if bool(write.get("user")) != bool(write.get("password_file")):
            yield "prometheus_remote_write", f"{write['url']} needs both user and password_file, or neither", ""
    for label, count in Counter(site.get("alertmanager_group_by") or []).items():
        if count > 1:
            yield "alertmanager_group_by", f"has {label} {count} times: leave it once", ""
    smtp = site.get("alertmanager_smtp") or {}
    for key in ("smarthost", "from"):
        if smtp and not smtp.get(key):
            yield "alertmanager_smtp", f"needs {key}", ""
    if bool(smtp.get("username")) != bool(smtp.get("password_file")):
        yield "alertmanager_smtp", "needs both username and password_file, or neither", ""
    receivers = site.get("alertmanager_receivers") or []
    rest = [receiver["name"] for receiver in receivers if "matchers" not in receiver and receiver["name"] != "watchdog"]
    if len(rest) > 1:
        text = f"{' and '.join(rest[1:])} would get nothing: of those without matchers {rest[0]} gets all; add matchers"
        yield "alertmanager_receivers", text, ""
    files = [("prometheus_rules_files", str(file)) for file in site.get("prometheus_rules_files") or []]
    files += [("alertmanager_smtp", smtp["password_file"])] if smtp.get("password_file") else []
    files += [("alertmanager_receivers", one["slack_url_file"]) for one in receivers if one.get("slack_url_file")]
    for where, file in files:
        if not Path(file).is_file():
            yield where, f"{file} is not on the control host: put it there", ""


def _native(job: Mapping[str, Any]) -> Iterator[Problem]:
    where, name = "prometheus_extra_scrape_configs", str(job.get("job_name") or "a job")
    for key in job:
        if key not in SCRAPE_KEYS and (near := get_close_matches(key, SCRAPE_KEYS, n=1, cutoff=0.85)):
            yield where, f"{name}: Prometheus has no {key}; did you mean {near[0]}?", ""
    for key in ("scrape_interval", "scrape_timeout"):
        if key in job and not DURATION.fullmatch(str(job[key])):
            yield where, f"{name}: {key} is {job[key]}, must have a unit, as 30s", ""
    for static in job.get("static_configs") or []:
        targets = static.get("targets")
        if not isinstance(targets, Sequence) or isinstance(targets, str):
            yield where, f"{name}: targets must be a list, as ['192.0.2.1:9100']", ""
            continue
        for target in map(str, targets):
            if "/" in target and not job.get("relabel_configs"):
                yield where, f"{name}: {target} must be HOST:PORT; the rest goes into scheme and metrics_path", ""


def grafana(site: Any) -> Iterator[Problem]:
    """Grafana has all of what its source and database need."""
    database, source = site.get("grafana_database") or {}, site.get("grafana_source")
    lacking = [key for key in ("host", "name", "user", "password_file") if not database.get(key)]
    if database.get("type") == "postgres" and lacking:
        yield "grafana_database", f"postgres needs {', '.join(lacking)}", ""
    if source in ("deb", "tarball") and not (site.get("grafana_file_url") and site.get("grafana_file_sha256")):
        yield "grafana_source", f"{source} needs grafana_file_url and grafana_file_sha256", ""
    for name, count in Counter(str(point["name"]) for point in site.get("grafana_contact_points") or []).items():
        if count > 1:
            yield "grafana_contact_points", f"{count} items have the name {name}: rename one", ""


def kubernetes(site: Any) -> Iterator[Problem]:
    """The release is one of the lock, and its networks are networks, the same on all servers."""
    servers, nodes = site.hosts("k3s_server"), [*site.hosts("k3s_server"), *site.hosts("k3s_agent")]
    for host in nodes:
        version, known = str(site.of(host, "k3s_version") or ""), site.of(host, "k3s_checksums") or {}
        if version and known and version not in known:
            near = get_close_matches(version, known, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ": add the SHA-256 of its files"
            yield "k3s_version", f"{version} is not one of k3s_checksums ({', '.join(known)}){hint}", host
    for host in servers:
        config = site.of(host, "k3s_config") or {}
        ranges = {}
        for key, default in {"cluster-cidr": "10.42.0.0/16", "service-cidr": "10.43.0.0/16"}.items():
            found = [_network(text.strip()) for text in str(config.get(key, default)).split(",")]
            ranges[key] = [network for network in found if network]
            if None in found or any(network.prefixlen == network.max_prefixlen for network in ranges[key]):
                yield f"k3s_config.{key}", f"{config[key]} is no network: write it as {default}", host
            first = (site.of(servers[0], "k3s_config") or {}).get(key, default)
            if config.get(key, default) != first:
                text = f"{config.get(key, default)}, but {servers[0]} has {first}: set it for all servers"
                yield f"k3s_config.{key}", text, host
        for text in str(config.get("cluster-dns") or "").split(","):
            at = _network(text.strip()) if text else None
            nets = ranges["service-cidr"]
            # Nodes of IPv6 have other networks unless set.
            set_here = "service-cidr" in config or ":" not in text
            inside = at and any(at.version == net.version and at.subnet_of(net) for net in nets)
            if text and set_here and not inside:
                yield "k3s_config.cluster-dns", f"{text} is not in service-cidr ({', '.join(map(str, nets))})", host


def firewall(site: Any) -> Iterator[Problem]:
    """What is let in comes from networks, to ports that there are."""
    for entry in site.get("firewall_extra") or []:
        yield from _wrong_networks("firewall_extra", entry.get("from") or [])
        for text in map(str, entry.get("ports") or []):
            ends = [int(end) for end in text.split("-")]
            if ends != sorted(ends) or not all(0 < end < 65536 for end in ends):
                yield "firewall_extra", f"{entry['what']}: {text} must be ports from 1 to 65535, the lower first", ""


def versions(site: Any) -> Iterator[Problem]:
    """Pins are of packages, and a version of NVIDIA's is not asked of the distribution."""
    if site.get("nvidia_driver_source") == "distribution" and site.get("nvidia_driver_version"):
        version = site.get("nvidia_driver_version")
        text = f"{version} needs nvidia_driver_source: nvidia; pin a package of the distribution in common_apt_pins"
        yield "nvidia_driver_version", text, ""
    if any(not pin["packages"] for pin in site.get("common_apt_pins") or []):
        yield "common_apt_pins", "an item has no packages: name some, or remove it", ""


RULES: tuple[Callable[[Any], Iterator[Problem]], ...] = (
    storage, folders, backups, monitoring, grafana, kubernetes, firewall, versions
)  # fmt: skip


def service_rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return RULES


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"service_rules": service_rules}
