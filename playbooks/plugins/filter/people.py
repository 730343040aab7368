"""Ansible filters: present and absent users of the cluster (`state` in ictx_users)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

User = Mapping[str, Any]


def present_users(users: Iterable[User]) -> list[User]:
    """Returns the users with an account."""
    return [user for user in users if user.get("state", "present") == "present"]


def absent_users(users: Iterable[User]) -> list[User]:
    """Returns the users whose accounts are removed."""
    return [user for user in users if user.get("state", "present") == "absent"]


def users_to_change(users: Iterable[User], accounts: str, group: str) -> list[User]:
    """Returns the users whose accounts need a change.

    Args:
        users: name, uid and optional state of each.
        accounts: lines of the passwd database and of the group database (getent), and homes that exist; a line "--"
            before the second and the third.
        group: group that each present user is a member of, beside one of the user's own name and number.
    """
    lines = accounts.splitlines()
    first, second = (number for number, line in enumerate(lines) if line == "--")
    found = {name: fields for name, *fields in (line.split(":") for line in lines[:first])}
    groups = [line.split(":") for line in lines[first + 1 : second]]
    gids = {name: gid for name, _, gid, _ in groups}
    members = {name: listed.split(",") for name, _, _, listed in groups}
    homes = lines[second + 1 :]

    def right(user: User) -> bool:
        name, uid = user["name"], str(user["uid"])
        if user.get("state", "present") == "absent":
            return name not in found
        if name not in found or gids.get(name) != uid or name not in members.get(group, []):
            return False
        _, its_uid, gid, _, home, shell = found[name]
        return (its_uid, gid, shell) == (uid, uid, "/bin/bash") and home in homes

    return [user for user in users if not right(user)]


def folders_to_change(users: Iterable[str], folders: Iterable[User], root: str, found: Iterable[User]) -> list[User]:
    """Returns path, owner, group and mode of the users' folders that are missing or need a change.

    Args:
        users: names of users.
        folders: path below the root, mode, and optional group, of the folders that contain one folder per user.
        root: path of the shared directory.
        found: files that the module `find` returned.
    """
    there = {file["path"]: (file["pw_name"], file["gr_name"], int(file["mode"], 8)) for file in found}
    wanted = [
        {"path": f"{root}/{folder['path']}/{user}", "owner": user, "group": folder.get("group", user)}
        | {"mode": folder["mode"]}
        for user in users
        for folder in folders
    ]
    return [
        folder
        for folder in wanted
        if there.get(folder["path"]) != (folder["owner"], folder["group"], int(folder["mode"], 8))
    ]


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {
            "absent_users": absent_users,
            "folders_to_change": folders_to_change,
            "present_users": present_users,
            "users_to_change": users_to_change,
        }
