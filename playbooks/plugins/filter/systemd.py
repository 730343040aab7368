"""Ansible filters: sandbox settings of the platform's services, and units that are not running or enabled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError

# Minimal rights of a service that reads files and listens on the network: see systemd.exec(5).
SANDBOX: dict[str, str] = {
    "CapabilityBoundingSet": "",
    "LockPersonality": "true",
    "MemoryDenyWriteExecute": "true",
    "NoNewPrivileges": "true",
    "PrivateDevices": "true",
    "PrivateTmp": "true",
    "ProtectClock": "true",
    "ProtectControlGroups": "true",
    "ProtectHome": "true",
    "ProtectHostname": "true",
    "ProtectKernelLogs": "true",
    "ProtectKernelModules": "true",
    "ProtectKernelTunables": "true",
    "ProtectProc": "invisible",
    "ProtectSystem": "strict",
    "RemoveIPC": "true",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "RestrictNamespaces": "true",
    "RestrictRealtime": "true",
    "RestrictSUIDSGID": "true",
    "SystemCallArchitectures": "native",
    "SystemCallErrorNumber": "EPERM",
    "SystemCallFilter": "@system-service\nSystemCallFilter=~@privileged",
    "UMask": "0027",
}


def sandbox(differences: Mapping[str, Any]) -> str:
    """Returns the sandbox lines of a unit's section [Service].

    Args:
        differences: directives with other values than in SANDBOX; null removes one.
    """
    directives = {**SANDBOX, **differences}
    for name, value in directives.items():
        if not isinstance(value, str | None) or "\n" in (differences.get(name) or ""):
            raise AnsibleFilterError(f"sandbox: {name} must be one line of text or null; got {value!r}")
    return "\n".join(f"{name}={value}" for name, value in sorted(directives.items()) if value is not None)


def unready(units: Sequence[str], shown: str) -> list[str]:
    """Returns the units that are not running or not enabled.

    Args:
        shown: output of `systemctl show --property=Id,ActiveState,UnitFileState UNITS`, one block per unit.
    """
    blocks = [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in shown.split("\n\n")]
    if len(blocks) != len(units):
        raise AnsibleFilterError(f"unready_units: {len(units)} units and {len(blocks)} blocks of systemctl show")
    right = {"ActiveState": "active", "UnitFileState": "enabled"}
    return [unit for unit, block in zip(units, blocks, strict=True) if not right.items() <= block.items()]


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns them by name."""
        return {"sandbox": sandbox, "unready_units": unready}
