"""Ansible filter: rules of preflight (meaning.py) about SLURM's accounts, associations, QOS and their limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Problem = tuple[str, str, str]

# SLURM's own resources; others are gres/NAME of the nodes' generic resources, and license/NAME.
TRES = ("billing", "bb/datawarp", "cpu", "energy", "fs/disk", "fs/lustre", "ic/ofed", "mem", "node", "pages", "vmem")
METRICS = "ictx-metrics"
QOS_FLAGS = (
    "DenyOnLimit",
    "EnforceUsageThreshold",
    "NoDecay",
    "NoReserve",
    "OverPartQOS",
    "PartitionMaxNodes",
    "PartitionMinNodes",
    "PartitionTimeLimit",
    "Relative",
    "RequiresReservation",
    "UsageFactorSafe",
)


def accounts(site: Any) -> Iterator[Problem]:
    """QOS, accounts, associations and partitions refer to existing, unique names; SLURM stores them in lowercase."""
    users = [user["name"] for user in site.get("ictx_users", []) if user.get("state", "present") == "present"]
    qos = [entry["name"].lower() for entry in site.kept("slurm_qos")]
    everybody = str(site.get("slurm_account", "ictx")).lower()
    named = [everybody, *(entry["name"].lower() for entry in site.kept("slurm_accounts"))]

    def unknown(where: str, what: str, names: Iterable[str], known: list[str], source: str = "") -> Iterator[Problem]:
        for name in names:
            if name not in known:
                text = "who is not one of ictx_users" if known is users else f"which is not in {source}"
                yield where, f"{what} {name}, {text}{site.close(name, known)}", ""

    for entry in site.kept("slurm_qos"):
        yield from unknown("slurm_qos", f"{entry['name']} has the user", entry.get("users", []), users)
        others = [name.lower() for name in entry.get("preempt", [])]
        yield from unknown("slurm_qos", f"{entry['name']} preempts", others, qos, "slurm_qos")
        if others and site.get("slurm_preempt_type") != "qos":
            yield "slurm_qos", f"{entry['name']} has preempt, which needs slurm_preempt_type: qos", ""
    for entry in site.kept("slurm_accounts"):
        parents = [str(entry.get("parent", "root")).lower()]
        yield from unknown(
            "slurm_accounts", f"{entry['name']} has the parent", parents, ["root", *named], "slurm_accounts"
        )
    for entry in site.kept("slurm_associations"):
        yield from unknown("slurm_associations", "an item has the user", [entry["user"]], users)
        account = [entry["account"].lower()]
        yield from unknown("slurm_associations", f"{entry['user']} has the account", account, named, "slurm_accounts")
    for name in ("slurm_accounts", "slurm_associations"):
        for entry in site.kept(name) if qos else []:
            wanted = [one.lower() for one in [*entry.get("qos", []), *filter(None, [entry.get("default_qos")])]]
            who = f"{entry.get('user', '')} {entry.get('name') or entry.get('account')}".strip()
            yield from unknown(name, f"{who} has the QOS", wanted, qos, "slurm_qos")
    for partition in site.get("slurm_partitions", []):
        allowed = [name.lower() for name in partition.get("allow_accounts", [])]
        yield from unknown(
            "slurm_partitions", f"{partition['name']} allows the account", allowed, named, "slurm_accounts"
        )
    names = [(name, entry["name"].lower()) for name in ("slurm_qos", "slurm_accounts") for entry in site.get(name, [])]
    names += [
        ("slurm_associations", f"{entry['user']} in {entry['account'].lower()}")
        for entry in site.get("slurm_associations", [])
    ]
    for (where, name), count in Counter(names).items():
        if count > 1:
            yield where, f"{count} items have the name {name}", ""
    for user, count in Counter(e["user"] for e in site.kept("slurm_associations") if e.get("default")).items():
        if count > 1:
            yield "slurm_associations", f"{user} has {count} default accounts: keep one", ""
    above = {entry["name"].lower(): str(entry.get("parent", "root")).lower() for entry in site.kept("slurm_accounts")}
    for name in site.loops(above):
        yield "slurm_accounts", f"{name} is its own ancestor: correct its parent", ""


def limits(site: Any) -> Iterator[Problem]:
    """Limits name resources that the accounting tracks."""
    there = {str(gres["name"]) for host in site.hosts("slurm_compute") for gres in site.gres(host)}
    config = {key.lower(): value for key, value in (site.get("slurm_config") or {}).items()}
    more = config.get("accountingstoragetres") or []
    listed = [name.strip().lower() for name in (more.split(",") if isinstance(more, str) else map(str, more))]
    # The role lists the nodes' resources without types; slurm_config overrides the list.
    known = [*TRES, *(listed or [f"gres/{name}" for name in sorted(there)])]
    for where in ("slurm_qos", "slurm_accounts", "slurm_associations"):
        for entry in site.kept(where):
            who = entry.get("name") or f"{entry['user']} in {entry['account']}"
            for key in (key for key in entry if "tres" in key):
                for name in entry[key]:
                    if name.lower() in known or name.lower().startswith("license/"):
                        continue
                    if name.lower().partition(":")[0] in known and ":" in name:
                        right = ", ".join([*known[len(TRES) :], name])
                        text = f"tracked by type only with slurm_config: {{AccountingStorageTRES: [{right}]}}"
                        yield where, f"{who}: {key} has {name}, which is {text}", ""
                    else:
                        hint = (
                            site.hint(name, known) or f": use {', '.join(['cpu', 'mem', 'node', *known[len(TRES) :]])}"
                        )
                        yield where, f"{who}: {key} has {name}, which neither a node nor SLURM has{hint}", ""


def operators(site: Any) -> Iterator[Problem]:
    """Operators are users of the cluster, or the metrics account that the role creates."""
    given, listed = site.get("ictx_users") or [], site.get("slurm_operators")
    present = [user["name"] for user in given if user.get("state", "present") == "present"]
    for name in dict.fromkeys(listed or []):
        if name in [user["name"] for user in given] and name not in present:
            yield "slurm_operators", f"{name} is absent in ictx_users: remove it here too", ""
        elif name not in [*present, METRICS] and (near := site.hint(name, [*present, METRICS])):
            yield "slurm_operators", f"{name} is not one of ictx_users{near}", ""
    if listed is not None and METRICS not in listed:
        yield "slurm_operators", f"lacks {METRICS}, which collects the metrics of all jobs: add it", ""


def qualities(site: Any) -> Iterator[Problem]:
    """QOS have known flags, no circular preemption, and default QOS are among the allowed ones."""
    above: dict[str, list[str]] = {}
    for entry in site.kept("slurm_qos"):
        for flag in entry.get("flags", []):
            if flag.lower() not in map(str.lower, QOS_FLAGS):
                hint = site.hint(flag, [*QOS_FLAGS]) or f": use {', '.join(QOS_FLAGS)}"
                yield "slurm_qos", f"{entry['name']} has the unknown flag {flag}{hint}", ""
        above[entry["name"].lower()] = [name.lower() for name in entry.get("preempt", [])]
    for name in above:
        reached, left = set[str](), list(above[name])
        while left:
            other = left.pop()
            left += [] if other in reached else above.get(other, [])
            reached.add(other)
        if name in reached:
            text = f"{name} preempts itself, through {', '.join(sorted(reached))}: remove one preempt"
            yield "slurm_qos", text, ""
    for where in ("slurm_accounts", "slurm_associations"):
        for entry in site.kept(where):
            own, default = [name.lower() for name in entry.get("qos", [])], str(entry.get("default_qos") or "")
            if own and default and default.lower() not in own:
                who = entry.get("name") or f"{entry['user']} in {entry['account']}"
                yield where, f"{who}: default_qos {default} is not one of its qos ({', '.join(own)}): add it there", ""


def names(site: Any) -> Iterator[Problem]:
    """Names of accounts and QOS begin with a letter; defaults are not absent."""
    for where, key in (("slurm_qos", "name"), ("slurm_accounts", "name"), ("slurm_associations", "account")):
        for name in dict.fromkeys(str(entry[key]) for entry in site.get(where, [])):
            if name[0].isdigit():
                yield where, f"{name} begins with a digit, which sacctmgr parses as a number: rename it", ""
    needed = {"slurm_accounts": str(site.get("slurm_account", "ictx")).lower(), "slurm_qos": "normal"}
    for where, name in needed.items():
        for entry in site.get(where, []):
            if entry.get("state") == "absent" and entry["name"].lower() == name:
                what = (
                    "slurm_account, the account of every user" if where == "slurm_accounts" else "the default of jobs"
                )
                yield where, f"{entry['name']} is {what}: it cannot be absent", ""
    if site.get("slurm_partitions") == []:
        yield "slurm_partitions", "is empty, so that no job can run: add one, such as {name: batch, default: true}", ""


def rules() -> tuple[Callable[[Any], Iterator[Problem]], ...]:
    """Returns the rules of this file."""
    return (accounts, limits, operators, qualities, names)


class FilterModule:
    """Filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns the filters by name."""
        return {"meaning_accounts": rules}
