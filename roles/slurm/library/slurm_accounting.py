#!/usr/bin/python
"""Ansible module: manages accounts, users, qualities of service and limits in SLURM's accounting database."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: slurm_accounting
short_description: Manages SLURM's accounts, associations and qualities of service
description:
  - Compares with C(sacctmgr show) and runs C(sacctmgr) for differences only; a second run changes nothing.
  - Limits that an entry does not set are reset. Objects without an entry are not changed; C(state=absent) removes one.
  - SLURM stores names of accounts and QOS in lower case; upper case is converted.
options:
  absent_users: {type: dict, default: {}, description: UIDs by name of users to remove; their jobs are cancelled.}
  account: {type: str, required: true, description: Account of all users; default unless associations set another.}
  accounts: {type: list, elements: dict, default: [], description: "Other accounts: name, parent, state and limits."}
  associations:
    type: list
    elements: dict
    default: []
    description: "Limits of users, and their other accounts: user, account, default, state and limits."
  cluster: {type: str, required: true, description: Name of the cluster.}
  operators: {type: list, elements: str, default: [], description: Operators, who cannot submit jobs.}
  qos: {type: list, elements: dict, default: [], description: "Qualities of service: name, users, state and limits."}
  users: {type: list, elements: str, default: [], description: Users.}
  wait_seconds: {type: int, default: 20, description: Seconds to wait for slurmdbd.}
author: [InfiniteContext]
"""

EXAMPLES = r"""
- name: Configure accounts and limits
  slurm_accounting:
    cluster: lab
    account: ictx
    users: [alice, bob]
    accounts: [{name: Physics, fairshare: 10, grp_tres: {gres/gpu: 8}}]
    associations: [{user: alice, account: Physics, default: true}]
    qos: [{name: normal, max_submit_per_user: 1000}]
"""

RETURN = r"""
commands: {type: list, elements: str, returned: always, description: Commands that made (or would make) changes.}
"""

Row = Mapping[str, str]
Command = list[str]


class Setting(NamedTuple):
    """Names of an option in sacctmgr (`key` to write, `column` to read), its format and its value if not set."""

    key: str
    column: str
    kind: str = "word"
    unset: Any = "-1"


QOS = {
    "flags": Setting("Flags", "Flags", "names"),
    "grace_seconds": Setting("GraceTime", "GraceTime", "seconds", "0"),
    "grp_jobs": Setting("GrpJobs", "GrpJobs"),
    "grp_submit": Setting("GrpSubmitJobs", "GrpSubmit"),
    "grp_tres": Setting("GrpTRES", "GrpTRES", "tres"),
    "grp_tres_minutes": Setting("GrpTRESMins", "GrpTRESMins", "tres"),
    "max_jobs_per_user": Setting("MaxJobsPerUser", "MaxJobsPU"),
    "max_submit_per_user": Setting("MaxSubmitJobsPerUser", "MaxSubmitPU"),
    "max_tres_per_account": Setting("MaxTRESPerAccount", "MaxTRESPA", "tres"),
    "max_tres_per_job": Setting("MaxTRESPerJob", "MaxTRES", "tres"),
    "max_tres_per_user": Setting("MaxTRESPerUser", "MaxTRESPU", "tres"),
    "max_wall": Setting("MaxWall", "MaxWall", "minutes"),
    "preempt": Setting("Preempt", "Preempt", "names"),
    "preempt_exempt_time": Setting("PreemptExemptTime", "PreemptExemptTime", "minutes"),
    "preempt_mode": Setting("PreemptMode", "PreemptMode", "word", "cluster"),
    "priority": Setting("Priority", "Priority", "word", "0"),
    "usage_factor": Setting("UsageFactor", "UsageFactor", "factor", "1"),
}
ASSOCIATION = {
    "default_qos": Setting("DefaultQOS", "DefaultQOS"),
    "fairshare": Setting("Fairshare", "Share", "word", "1"),
    "grp_jobs": Setting("GrpJobs", "GrpJobs"),
    "grp_submit": Setting("GrpSubmitJobs", "GrpSubmit"),
    "grp_tres": Setting("GrpTRES", "GrpTRES", "tres"),
    "grp_tres_minutes": Setting("GrpTRESMins", "GrpTRESMins", "tres"),
    "max_jobs": Setting("MaxJobs", "MaxJobs"),
    "max_submit": Setting("MaxSubmitJobs", "MaxSubmit"),
    "max_tres_per_job": Setting("MaxTRES", "MaxTRES", "tres"),
    "max_wall": Setting("MaxWall", "MaxWall", "minutes"),
    "priority": Setting("Priority", "Priority"),
    "qos": Setting("QOS", "QOS", "names"),
}
UNITS = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2, "P": 1024**3}


def seconds(text: str) -> int:
    """Returns a time in SLURM's format (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in seconds."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)
    hours, minutes, rest_seconds = [*parts, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest_seconds


def tres(value: str | Mapping[str, Any]) -> dict[str, str]:
    """Returns numbers by resource; memory in MB, which sacctmgr shows with a unit."""
    pairs = value.items() if isinstance(value, Mapping) else [item.split("=") for item in value.split(",") if item]
    found = {name.lower(): str(number) for name, number in pairs}
    for name in found.keys() & {"mem"}:
        unit = found[name][-1].upper()
        if unit in UNITS:
            found[name] = str(round(float(found[name][:-1]) * UNITS[unit]))
    return found


def canonical(setting: Setting, value: Any) -> Any:
    """Returns a value of the inventory or of sacctmgr in a normal form for comparison."""
    if setting.kind == "tres":
        return tres(value or "")
    if setting.kind == "names":
        names = value.split(",") if isinstance(value, str) else value or []
        return sorted({name.lower() for name in names if name})
    if value in (None, ""):
        return setting.unset
    text = str(value)
    if setting.kind == "minutes":
        return "-1" if text.upper() in ("UNLIMITED", "INFINITE") else str(ceil(seconds(text) / 60))
    if setting.kind == "seconds":
        return text if text.isdigit() else str(seconds(text))
    return f"{float(text):g}" if setting.kind == "factor" else text.lower()


def assignments(table: Mapping[str, Setting], entry: Mapping[str, Any], row: Row | None) -> Iterator[str]:
    """Yields KEY=VALUE for the differences between an entry of the inventory and a row of sacctmgr."""
    for option, setting in table.items():
        wanted, present = (canonical(setting, value) for value in (entry.get(option), (row or {}).get(setting.column)))
        if wanted == present:
            continue
        if setting.kind == "tres":
            pairs = dict.fromkeys(present, "-1") | wanted
            yield f"{setting.key}={','.join(f'{name}={number}' for name, number in sorted(pairs.items()))}"
        elif setting.kind == "names":
            yield f"{setting.key}={','.join(wanted) or ('-1' if setting.key == 'Flags' else '')}"
        else:
            yield f"{setting.key}={wanted}"


def gone(entry: Mapping[str, Any]) -> bool:
    """Returns whether an entry is to be removed."""
    return entry.get("state") == "absent"


def parents_first(accounts: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the accounts with each after its parent. Raises ValueError for a cycle."""
    left, ordered = list(accounts), []
    while left:
        waiting = {entry["name"].lower() for entry in left}
        ready = [entry for entry in left if (entry.get("parent") or "root").lower() not in waiting]
        if not ready:
            raise ValueError(f"accounts have a cycle of parents: {', '.join(sorted(waiting))}")
        ordered += ready
        left = [entry for entry in left if entry not in ready]
    return ordered


class Present(NamedTuple):
    """State of the database by name; associations by account and user (empty: the account's own)."""

    clusters: Sequence[str]
    qos: Mapping[str, Row]
    associations: Mapping[tuple[str, str], Row]
    users: Mapping[str, Row]


def qos_commands(wanted: Mapping[str, Any], present: Present) -> Iterator[Command]:
    """Yields commands that add and change QOS; all are added before one may preempt another."""
    kept = [entry for entry in wanted["qos"] if not gone(entry)]
    for entry in kept:
        if entry["name"].lower() not in present.qos:
            yield ["add", "qos", entry["name"].lower()]
    for entry in kept:
        name = entry["name"].lower()
        if settings := list(assignments(QOS, entry, present.qos.get(name))):
            yield ["modify", "qos", name, "set", *settings]


def account_commands(wanted: Mapping[str, Any], present: Present) -> Iterator[Command]:
    """Yields commands that add and change accounts."""
    cluster = f"cluster={wanted['cluster']}"
    listed = list(wanted["accounts"])
    # Limits of an account or association without an entry of its own are not changed.
    implied = {"name": wanted["account"]}
    if implied["name"].lower() not in [entry["name"].lower() for entry in listed]:
        listed.insert(0, implied)
    for entry in parents_first(entry for entry in listed if not gone(entry)):
        name, parent = entry["name"].lower(), (entry.get("parent") or "root").lower()
        row = present.associations.get((name, ""))
        if row is None:
            yield ["add", "account", name, cluster, f"parent={parent}"]
        elif row["ParentName"] != parent and entry is not implied:
            yield ["modify", "account", "where", f"name={name}", cluster, "set", f"parent={parent}"]
        if entry is not implied and (settings := list(assignments(ASSOCIATION, entry, row))):
            yield ["modify", "account", "where", f"name={name}", cluster, "set", *settings]


def user_commands(wanted: Mapping[str, Any], present: Present) -> Iterator[Command]:
    """Yields commands that add and change users' associations and default accounts."""
    cluster, everybody = f"cluster={wanted['cluster']}", wanted["account"].lower()
    listed: dict[tuple[str, str], Mapping[str, Any]] = {(user, everybody): {} for user in wanted["users"]}
    listed |= {(entry["user"], entry["account"].lower()): entry for entry in wanted["associations"]}
    default = dict.fromkeys(wanted["users"], everybody)
    for (user, account), entry in listed.items():
        if gone(entry):
            continue
        if entry.get("default"):
            default[user] = account
        row = present.associations.get((account, user))
        if row is None:
            yield ["add", "user", user, f"account={account}", cluster]
        may_use = [qos["name"] for qos in wanted["qos"] if not gone(qos) and user in qos.get("users", [user])]
        table = ASSOCIATION if entry else {"qos": ASSOCIATION["qos"]}
        if settings := list(assignments(table, {"qos": may_use, **entry}, row)):
            yield ["modify", "user", "where", f"name={user}", f"account={account}", cluster, "set", *settings]
    for user, account in default.items():
        # The first account that a user gets is the default.
        first = next(name for whose, name in listed if whose == user)
        if present.users.get(user, {}).get("Def Acct", first) != account:
            yield ["modify", "user", "where", f"name={user}", cluster, "set", f"defaultaccount={account}"]


def removals(wanted: Mapping[str, Any], present: Present) -> Iterator[Command]:
    """Yields commands that remove entries with `state: absent`: associations, accounts (children first), QOS."""
    cluster = f"cluster={wanted['cluster']}"
    for entry in filter(gone, wanted["associations"]):
        if (entry["account"].lower(), entry["user"]) in present.associations:
            yield ["delete", "user", "where", f"name={entry['user']}", f"account={entry['account'].lower()}", cluster]
    for entry in reversed(parents_first(filter(gone, wanted["accounts"]))):
        if (entry["name"].lower(), "") in present.associations:
            yield ["delete", "account", "where", f"name={entry['name'].lower()}", cluster]
    for entry in filter(gone, wanted["qos"]):
        if entry["name"].lower() in present.qos:
            yield ["delete", "qos", "where", f"name={entry['name'].lower()}"]


def commands(wanted: Mapping[str, Any], present: Present) -> Iterator[Command]:
    """Yields all commands that change the database to the inventory's settings."""
    cluster = wanted["cluster"]
    if cluster not in present.clusters:
        yield ["sacctmgr", "-i", "add", "cluster", cluster]
    for steps in (qos_commands, account_commands, user_commands, removals):
        for command in steps(wanted, present):
            yield ["sacctmgr", "-i", *command]
    for user, uid in wanted["absent_users"].items():
        if any(user == name for _, name in present.associations):
            # By uid, because the account may be deleted. An association cannot be removed while jobs run.
            yield ["scancel", f"--user={uid}"]
            yield ["sacctmgr", "-i", "delete", "user", "where", f"name={user}", f"cluster={cluster}"]
    for user in wanted["operators"]:
        # Operators may not submit: GrpSubmitJobs, because a QOS would override MaxSubmitJobs of the account.
        if user not in present.users:
            rights = ["adminlevel=Operator", "grpsubmitjobs=0"]
            yield ["sacctmgr", "-i", "add", "user", user, "account=root", f"cluster={cluster}", *rights]
        elif present.users[user]["Admin"] != "Operator":
            yield ["sacctmgr", "-i", "modify", "user", "where", f"name={user}", "set", "adminlevel=Operator"]


def rows(text: str) -> list[Row]:
    """Parses the output of `sacctmgr --parsable2 show`, by its headings."""
    head, *lines = text.splitlines() or [""]
    return [dict(zip(head.split("|"), line.split("|"), strict=True)) for line in lines]


class Database:
    """SLURM's accounting database, through sacctmgr."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module

    def show(self, *what: str, columns: Iterable[str]) -> list[Row]:
        """Returns rows of a table by the requested column names; sacctmgr's headings differ."""
        names = list(columns)
        _, text, _ = self.module.run_command(
            ["sacctmgr", "--parsable2", "--noheader", "show", *what, f"format={','.join(names)}"], check_rc=True
        )
        return rows("\n".join(["|".join(names), *text.splitlines()]))

    def present(self, cluster: str) -> Present:
        """Returns the state of the database."""
        columns = ["Account", "User", "ParentName", *(setting.column for setting in ASSOCIATION.values())]
        # Without limits inherited from parents.
        listed = self.show("association", "WOPLimits", f"cluster={cluster}", columns=columns)
        qos = self.show("qos", columns=["Name", *(setting.column for setting in QOS.values())])
        users = self.show("user", columns=["User", "DefaultAccount", "AdminLevel"])
        return Present(
            [row["Cluster"] for row in self.show("cluster", columns=["Cluster"])],
            {row["Name"]: row for row in qos},
            {(row["Account"], row["User"]): row for row in listed},
            {row["User"]: {"Def Acct": row["DefaultAccount"], "Admin": row["AdminLevel"]} for row in users},
        )

    def change(self, command: Command) -> None:
        """Runs a command. A user's association can be removed only after the last job has ended."""
        patience = 90 if command[2:4] == ["delete", "user"] else 0
        began = time.monotonic()
        while True:
            code, out, error = self.module.run_command(command)
            if code == 0:
                return
            if time.monotonic() - began > patience:
                self.module.fail_json(msg=f"{' '.join(command)}: {(out + error).strip()}", rc=code)
            time.sleep(3)


def main() -> None:
    """Runs the module."""
    lists = {name: {"type": "list", "elements": "dict", "default": []} for name in ("accounts", "associations", "qos")}
    lists |= {name: {"type": "list", "elements": "str", "default": []} for name in ("operators", "users")}
    module = AnsibleModule(
        argument_spec={
            **lists,
            "absent_users": {"type": "dict", "default": {}},
            "account": {"type": "str", "required": True},
            "cluster": {"type": "str", "required": True},
            "wait_seconds": {"type": "int", "default": 20},
        },
        supports_check_mode=True,
    )
    database = Database(module)
    # The controller registers itself with slurmdbd some seconds after its first start.
    deadline = time.monotonic() + (0 if module.check_mode else module.params["wait_seconds"])
    while module.run_command(["sacctmgr", "-nP", "show", "cluster", "format=Cluster"])[0] != 0:
        if time.monotonic() > deadline:
            if module.check_mode:
                module.exit_json(changed=True, commands=[], msg="the accounting database does not respond yet")
            module.fail_json(msg="the accounting database does not respond: see `systemctl status slurmdbd`")
        time.sleep(1)
    try:
        steps = list(commands(module.params, database.present(module.params["cluster"])))
    except ValueError as error:
        module.fail_json(msg=str(error))
    if not module.check_mode:
        for command in steps:
            database.change(command)
    shown = [" ".join(command) for command in steps]
    module.exit_json(changed=bool(steps), commands=shown, diff={"prepared": "".join(f"{line}\n" for line in shown)})


if __name__ == "__main__":
    main()
