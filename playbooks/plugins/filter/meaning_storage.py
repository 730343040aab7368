"""Ansible filter: rules of preflight (meaning.py) about storage and backups."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

Problem = tuple[str, str, str]

FOLDERS = ("bundles", "data", "images", "runs")
KEPT = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
NAMED = "minutely|hourly|daily|weekly|monthly|quarterly|semiannually|yearly|annually"
DAY = "(mon(day)?|tue(sday)?|wed(nesday)?|thu(rsday)?|fri(day)?|sat(urday)?|sun(day)?)"
NUMBER = r"(\*|\d+)((,|\.\.)\d+)*(/\d+)?"
HOUR, MINUTE = (rf"(\*|{one}((,|\.\.){one})*)(/\d+)?" for one in (r"([01]?\d|2[0-3])", r"[0-5]?\d"))
# Parts of a systemd calendar expression, in order; each is optional.
CALENDAR = (
    rf"{DAY}((,|\.\.|-){DAY})*",
    rf"({NUMBER}-)?{NUMBER}[-~]{NUMBER}",
    rf"{HOUR}:{MINUTE}(:{MINUTE}(\.\d+)?)?",
    r"UTC|[A-Z][A-Za-z]+(/[A-Za-z_+-]+)+",
)
CRON = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))


def storage(site: Any) -> Iterator[Problem]:
    """Compute and login nodes may mount the export read-write; it has the folders that the platform uses."""
    clients = site.get("storage_nfs_clients") or []
    networks = [site.network(str(client)) for client in clients]
    if site.hosts("storage_server") and site.get("storage_type") == "nfs" and clients and all(networks):
        for host in dict.fromkeys([*site.hosts("slurm_compute"), *site.hosts("slurm_login")]):
            at = site.network(site.address(host))
            alike: list[Any] = [net for net in networks if net and at and net.version == at.version]
            if at and alike and not any(at.subnet_of(net) for net in alike):
                text = f"lacks the network of {host} ({site.address(host)}), which could not mount the export: add it"
                yield "storage_nfs_clients", text, ""
                break
    for option in {"ro", "suid", "dev"} & {str(option) for option in site.get("storage_nfs_options") or []}:
        right = {"ro": "rw", "suid": "nosuid (the role's)", "dev": "nodev (the role's)"}[option]
        yield "storage_nfs_options", f"{option} contradicts {right}: remove it", ""
    given = site.get("storage_folders")
    there = [str(folder["path"]).rstrip("/") for folder in given or []]
    if given is not None and (lacking := [name for name in FOLDERS if name not in there]):
        yield "storage_folders", f"lacks {', '.join(lacking)}, which the platform uses: add the role's defaults", ""
    for folder in site.get("storage_user_folders") or []:
        if given is not None and str(folder["path"]).rstrip("/") not in there:
            yield "storage_user_folders", f"{folder['path']} is not one of storage_folders: add it there", ""


def backups(site: Any) -> Iterator[Problem]:
    """Backups have a valid schedule, named folders, and a retention."""
    keep = site.get("backup_keep")
    for name in keep or {}:
        if name not in KEPT:
            yield "backup_keep", f"has the unknown key {name}: use {', '.join(KEPT)}", ""
    if keep is not None and not any(int(number) for number in keep.values()):
        yield "backup_keep", "keeps nothing: set it, such as {daily: 7}", ""
    for name, path in (site.get("backup_extra_paths") or {}).items():
        if not re.fullmatch("[a-z0-9][a-z0-9-]*", name):
            yield "backup_extra_paths", f"{name} must be a name of lowercase letters, digits or '-'", ""
        if not re.fullmatch("/[^/].*", str(path)):
            yield "backup_extra_paths", f"{name}: {path} must be an absolute path", ""
    when = str(site.get("backup_on_calendar") or "")
    if when and not _is_calendar(when):
        text = f"{when} is not a systemd calendar expression: write it like daily, '*-*-* 02:30:00' or 'Sat 22:30'"
        yield "backup_on_calendar", text, ""
    schedule = str(site.get("k3s_etcd_snapshot_schedule") or "")
    if schedule and not schedule.startswith("@") and not _is_cron(schedule):
        yield "k3s_etcd_snapshot_schedule", f"{schedule} is not a cron schedule: write it like '0 */12 * * *'", ""


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


def rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return (storage, backups)


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"meaning_storage": rules}
