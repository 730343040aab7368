"""Accounts, users and limits are set as in the inventory, with commands only for differences.

The output of sacctmgr is that of SLURM 22.05; molecule/default runs the module against a real database.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from cluster import ROOT
from programs import loaded

module = loaded(ROOT / "roles/slurm/library/slurm_accounting.py")
USERS = {"alice": {"Def Acct": "ictx", "Admin": "None"}, "ictx-metrics": {"Def Acct": "root", "Admin": "Operator"}}


def shown(table: Mapping[str, Any], **columns: str) -> dict[str, str]:
    """Returns a row of sacctmgr with only these columns set."""
    unset = {"Priority": "", "Share": "1", "GraceTime": "00:00:00", "PreemptMode": "cluster", "UsageFactor": "1.000000"}
    return {setting.column: unset.get(setting.column, "") for setting in table.values()} | columns


def steps(there: dict[tuple[str, str], Any], other: dict[str, Any] | None = None, /, **wanted: Any) -> list[str]:
    """Returns the commands for a database with these associations and QOS."""
    rows = {key: shown(module.ASSOCIATION, **{"ParentName": "root", **row}) for key, row in there.items()}
    of_qos = {name: shown(module.QOS, **{"Priority": "0", **row}) for name, row in (other or {}).items()}
    empty = {"absent_users": {}, "accounts": [], "associations": [], "operators": [], "qos": [], "users": []}
    inventory = {**empty, "account": "ictx", "cluster": "lab", **wanted}
    found = module.commands(inventory, module.Present(["lab"], of_qos, rows, USERS))
    return [" ".join(command).removeprefix("sacctmgr -i ") for command in found]


@pytest.mark.parametrize(
    ("kind", "inventory", "sacctmgr"),
    [
        ("tres", {"cpu": 100, "mem": "64G", "gres/gpu": 8}, "cpu=100,gres/gpu=8,mem=64G"),
        ("tres", {"mem": 65536}, "mem=64G"),
        ("tres", {"mem": "64500M"}, "mem=64500M"),
        ("minutes", "26:00:00", "1-02:00:00"),
        ("minutes", "90", "01:30:00"),
        ("minutes", "UNLIMITED", ""),
        ("seconds", 90, "00:01:30"),
        ("seconds", 90000, "1-01:00:00"),
        ("names", ["HighPrio", "normal"], "highprio,normal"),
        ("names", ["OverPartQOS"], "OverPartQoS"),
        ("factor", 2, "2.000000"),
        ("factor", 0.5, "0.500000"),
        ("word", 5, "5"),
        ("word", "REQUEUE", "requeue"),
        ("word", None, ""),
    ],
)
def test_a_value_of_the_inventory_and_what_sacctmgr_shows_of_it_are_equal(
    kind: str, inventory: Any, sacctmgr: str
) -> None:
    setting = module.Setting("Key", "Column", kind)
    assert module.canonical(setting, inventory) == module.canonical(setting, sacctmgr)


def test_the_second_run_changes_nothing_names_in_capitals_included() -> None:
    wanted = {
        "accounts": [
            {"name": "Optics", "parent": "Physics", "max_wall": "26:00:00", "fairshare": "parent"},
            {"name": "Physics", "fairshare": 10, "grp_tres": {"cpu": 100, "mem": "64G"}, "qos": ["normal", "HighPrio"]},
        ],
        "associations": [{"user": "alice", "account": "Optics", "max_jobs": 4}],
        "qos": [{"name": "HighPrio", "users": ["alice"], "grace_seconds": 90, "flags": ["DenyOnLimit"]}],
        "users": ["alice"],
        "operators": ["ictx-metrics"],
    }
    assert steps({("ictx", ""): {}, ("ictx", "alice"): {}}, **wanted) == [
        "add qos highprio",
        "modify qos highprio set Flags=denyonlimit GraceTime=90",
        "add account physics cluster=lab parent=root",
        "modify account where name=physics cluster=lab set Fairshare=10 GrpTRES=cpu=100,mem=65536 QOS=highprio,normal",
        "add account optics cluster=lab parent=physics",
        "modify account where name=optics cluster=lab set Fairshare=parent MaxWall=1560",
        "modify user where name=alice account=ictx cluster=lab set QOS=highprio",
        "add user alice account=optics cluster=lab",
        "modify user where name=alice account=optics cluster=lab set MaxJobs=4 QOS=highprio",
    ]
    there = {
        ("ictx", ""): {},
        ("ictx", "alice"): {"QOS": "highprio"},
        ("physics", ""): {"Share": "10", "GrpTRES": "cpu=100,mem=64G", "QOS": "highprio,normal"},
        ("optics", ""): {"Share": "parent", "MaxWall": "1-02:00:00", "ParentName": "physics"},
        ("optics", "alice"): {"MaxJobs": "4", "QOS": "highprio"},
    }
    qos = {"highprio": {"GraceTime": "00:01:30", "Flags": "DenyOnLimit"}}
    assert steps(there, qos, **wanted) == []


def test_what_an_entry_does_not_have_any_more_is_reset_and_what_none_names_is_left() -> None:
    there = {
        ("ictx", ""): {"GrpJobs": "7"},
        ("physics", ""): {"Share": "10", "GrpTRES": "cpu=100,mem=64G", "DefaultQOS": "normal"},
        ("other", ""): {"Share": "99"},
        ("ictx", "alice"): {"MaxJobs": "3", "QOS": "normal"},
    }
    qos = {
        "normal": {"MaxTRESPU": "cpu=4,gres/gpu=2", "Preempt": "scavenge", "Flags": "NoDecay", "PreemptMode": "cancel"},
        "scavenge": {"Priority": "7"},
    }
    wanted = {"accounts": [{"name": "physics", "grp_tres": {"cpu": 100}}], "users": ["alice"]}
    assert steps(there, qos, **wanted, qos=[{"name": "normal", "max_tres_per_user": {"cpu": 8}}]) == [
        "modify qos normal set Flags=-1 MaxTRESPerUser=cpu=8,gres/gpu=-1 Preempt= PreemptMode=cluster",
        "modify account where name=physics cluster=lab set DefaultQOS=-1 Fairshare=1 GrpTRES=cpu=100,mem=-1",
    ]


def test_what_is_absent_goes_users_before_accounts_and_children_before_parents() -> None:
    there: dict[tuple[str, str], Any] = {
        ("ictx", ""): {},
        ("ictx", "alice"): {},
        ("physics", ""): {},
        ("optics", ""): {"ParentName": "physics"},
        ("optics", "alice"): {},
        ("ictx", "carol"): {},
    }
    absent = {"state": "absent"}
    assert steps(
        there,
        {"old": {}},
        users=["alice"],
        accounts=[{"name": "Physics", **absent}, {"name": "Optics", "parent": "Physics", **absent}],
        associations=[{"user": "alice", "account": "Optics", **absent}],
        qos=[{"name": "OLD", **absent}, {"name": "never", **absent}],
        absent_users={"carol": 2003, "dave": 2004},
    ) == [
        "delete user where name=alice account=optics cluster=lab",
        "delete account where name=optics cluster=lab",
        "delete account where name=physics cluster=lab",
        "delete qos where name=old",
        "scancel --user=2003",
        "delete user where name=carol cluster=lab",
    ]


def test_a_default_account_follows_the_inventory_there_and_back() -> None:
    there: dict[tuple[str, str], Any] = {("ictx", ""): {}, ("ictx", "alice"): {}, ("a", ""): {}, ("a", "alice"): {}}
    other = [{"user": "alice", "account": "A", "default": True}]
    move = "modify user where name=alice cluster=lab set defaultaccount=a"
    assert steps(there, users=["alice"], accounts=[{"name": "a"}], associations=other) == [move]
    assert steps(there, users=["alice"], accounts=[{"name": "a"}]) == []


def test_operators_submit_nothing() -> None:
    assert steps({("ictx", ""): {}}, operators=["ictx-metrics", "watch", "alice"]) == [
        "add user watch account=root cluster=lab adminlevel=Operator grpsubmitjobs=0",
        "modify user where name=alice set adminlevel=Operator",
    ]


def test_accounts_that_are_below_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="cycle of parents: a, b"):
        module.parents_first([{"name": "A", "parent": "b"}, {"name": "b", "parent": "a"}])
