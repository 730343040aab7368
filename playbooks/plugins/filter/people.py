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


def users_to_change(users: Iterable[User], accounts: str, group: str) -> list[User]:
    """Returns the users whose accounts are not as they should be.

    Args:
        users: name and uid of each, and maybe their state.
        accounts: lines of the passwd database, a line "--", and lines of the group database (getent).
        group: group that each present user is a member of, beside one of the user's own name and number.
    """
    lines = [line.split(":") for line in accounts.splitlines()]
    end = lines.index(["--"])
    found = {name: fields for name, *fields in lines[:end]}
    gids = {name: gid for name, _, gid, _ in lines[end + 1 :]}
    members = {name: listed.split(",") for name, _, _, listed in lines[end + 1 :]}

    def right(user: User) -> bool:
        name, uid = user["name"], str(user["uid"])
        if user.get("state", "present") == "absent":
            return name not in found
        if name not in found or gids.get(name) != uid or name not in members.get(group, []):
            return False
        _, its_uid, gid, _, _, shell = found[name]
        return (its_uid, gid, shell) == (uid, uid, "/bin/bash")

    return [user for user in users if not right(user)]


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"absent_users": absent_users, "present_users": present_users, "users_to_change": users_to_change}
