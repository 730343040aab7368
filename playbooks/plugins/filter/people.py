"""Ansible filters: who uses the cluster, and who does no longer (`state: absent` in ictx_users)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

User = Mapping[str, Any]


def present_users(users: Iterable[User]) -> list[User]:
    """Returns those who use the cluster."""
    return [user for user in users if user.get("state", "present") == "present"]


def absent_users(users: Iterable[User]) -> list[User]:
    """Returns those whose accounts are removed."""
    return [user for user in users if user.get("state", "present") == "absent"]


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"absent_users": absent_users, "present_users": present_users}
