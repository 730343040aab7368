"""Ansible filter: how services of ours are shut in, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

# What a service that reads files and answers on the network needs, and nothing else: see systemd.exec(5).
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
    """Returns the lines of a unit's section [Service] that shut the service in.

    Args:
        differences: directives with a value of their own; null leaves out one of SANDBOX.
    """
    directives = {**SANDBOX, **differences}
    for name, value in directives.items():
        if not isinstance(value, str | None) or "\n" in (differences.get(name) or ""):
            raise AnsibleFilterError(f"sandbox: {name} must be one line of text or null; got {value!r}")
    return "\n".join(f"{name}={value}" for name, value in sorted(directives.items()) if value is not None)


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns them by name."""
        return {"sandbox": sandbox}
