"""Ansible filters: users of an external registry, and whether it accepts them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def registry_users(variables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the user that pulls and, if different, the one that pushes: user, password_file and ca_file."""
    access = variables.get("ictx_registry_external")
    if access is None or "ictx_registry" not in variables:
        return []
    users = [
        {name: access.get(f"{prefix}{name}", "") for name in ("user", "password_file")} for prefix in ("", "push_")
    ]
    return [user | {"ca_file": access.get("ca_file", "")} for user in users if user is users[0] or user["user"]]


def registry_problems(answers: Iterable[Mapping[str, Any]], variables: Mapping[str, Any]) -> list[str]:
    """Returns a line for each user that the registry rejects, from the registered responses of /v2/."""
    registry = variables.get("ictx_registry", "")
    found = []
    for answer in answers:
        status, user = answer.get("status", -1), (answer.get("item") or {}).get("user")
        who = f"the user {user}" if user else "anonymous access"
        if status == 401 and "bearer" in str(answer.get("www_authenticate", "")).lower():
            text = "requires tokens (Bearer): use a registry with HTTP basic authentication"
        elif status in (401, 403):
            text = f"rejects {who} ({status}): correct ictx_registry_external"
        elif status != 200:
            reason = str(answer.get("msg", "")).removeprefix(f"Status code was {status} and not [200]: ")
            text = f"does not respond like a registry ({reason}): correct it, or ca_file of ictx_registry_external"
        else:
            continue
        found.append(f"ictx_registry: https://{registry}/v2/ {text}")
    return found


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"registry_problems": registry_problems, "registry_users": registry_users}
