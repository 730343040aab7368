"""Ansible filter: rules of preflight (meaning.py) about folders: not the system's, and not emptied by a reboot."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

Problem = tuple[str, str, str]

# Including everything below them: emptied by a reboot, or owned by the system.
LOST = "boot|dev|etc|run|sys|tmp"
# Only these folders themselves; subfolders may be used.
SHARED = "bin|lib|lib64|sbin|usr|var|var/lib|var/tmp"
OF_PLATFORM = re.compile(rf"/|/({LOST}|{SHARED}|root)")
# Hidden by a mount there, or not visible to jobs.
HIDDEN = re.compile(rf"/({LOST}|root)/.*|/home|/opt(/ictx(/.*)?)?")
OF_SERVICES = re.compile(rf"/({LOST}|root)(/.*)?|/opt(/ictx(/.*)?)?|/({SHARED}|home|var/log)")
OF_SLURM = re.compile(rf"/({LOST})(/.*)?|/({SHARED}|home|opt|root|srv|var/log)/?")


def platform(site: Any) -> Iterator[Problem]:
    """The platform's folders are not the system's, and secrets are not on shared storage."""
    shared, state, cache = (site.get(f"ictx_{kind}_dir") for kind in ("shared", "state", "cache"))
    named = {"ictx_shared_dir": shared, "ictx_state_dir": state, "ictx_cache_dir": cache}
    for name, folder in named.items():
        hidden = name == "ictx_shared_dir" and HIDDEN.fullmatch(str(folder).rstrip("/"))
        if folder and (hidden or OF_PLATFORM.fullmatch(str(folder).rstrip("/") or "/")):
            yield name, f"{folder} belongs to the system: use a separate folder, such as {folder.rstrip('/')}/ictx", ""
    if shared and state and _below(state, shared):
        yield "ictx_state_dir", f"{state} contains secrets, but is on shared storage ({shared}): move it", ""
    if state and cache and (_below(state, cache) or _below(cache, state)):
        yield "ictx_cache_dir", f"{cache} may be deleted at any time, {state} never: do not nest them", ""
    if site.hosts("storage_server") and site.get("storage_type") == "nfs" and site.get("storage_nfs_clients") == []:
        yield "storage_nfs_clients", "is empty, so that no node can mount the export: add the nodes' networks", ""
    if site.get("ictx_backup") is True and not site.get("ictx_backup_repository"):
        yield "ictx_backup_repository", "is not set, but ictx_backup is true: set it to a restic repository", ""


def services(site: Any) -> Iterator[Problem]:
    """Folders are not the system's, and survive a reboot."""
    shared = str(site.get("ictx_shared_dir") or "").rstrip("/")
    for name in ("storage_nfs_export", "prometheus_storage_dir", "registry_storage_dir", "ictx_backup_repository"):
        folder = str(site.get(name) or "")
        if folder.startswith("/") and OF_SERVICES.fullmatch(folder.rstrip("/") or "/"):
            text = f"{folder} is the system's, or emptied by a reboot: use a separate folder, such as /srv/ictx"
            yield name, text, ""
    for name in ("prometheus_storage_dir", "storage_nfs_export"):
        folder = str(site.get(name) or "")
        if shared and _below(folder, shared):
            export = name == "storage_nfs_export"
            what = "where its clients mount it" if export else "a network file system, which can corrupt it"
            yield name, f"{folder} is on the shared directory ({shared}), {what}: use a folder of a local disk", ""
    state, backup = (str(site.get(f"ictx_{name}") or "") for name in ("state_dir", "backup_repository"))
    if state and backup and _below(backup, state):
        yield "ictx_backup_repository", f"{backup} is in ictx_state_dir, and lost with it: use another disk", ""


def slurm(site: Any) -> Iterator[Problem]:
    """SLURM's folders survive a reboot, and folders of one node are not shared."""
    shared, private = str(site.get("ictx_shared_dir") or ""), str(site.get("slurm_private_tmp_dir") or "")
    if shared and _below(private, shared):
        text = f"{private} is on the shared directory ({shared}): use a folder of a local disk"
        yield "slurm_private_tmp_dir", text, ""
    for name in ("slurm_private_tmp_dir", "slurm_state_dir"):
        folder = str(site.get(name) or "")
        if folder and (OF_SLURM.fullmatch(folder) or folder.rstrip("/") == shared.rstrip("/")):
            what = (
                "the shared directory itself"
                if folder.rstrip("/") == shared.rstrip("/")
                else "the system's, or emptied by a reboot"
            )
            yield name, f"{folder} is {what}: use a separate folder, such as /var/lib/slurm/{name.split('_')[1]}", ""
    for path, count in Counter(disk["path"] for disk in site.get("slurm_health_disks", [])).items():
        if count > 1:
            yield "slurm_health_disks", f"{count} items have the path {path}", ""


def _below(folder: Any, other: Any) -> bool:
    return f"{str(folder).rstrip('/')}/".startswith(f"{str(other).rstrip('/')}/")


def rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return (platform, services, slurm)


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"meaning_folders": rules}
