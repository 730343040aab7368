"""Users with `state` present and absent, in every part of the platform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from ansible.template import Templar
from cluster import ROOT, Cluster, trusted
from programs import loaded, play

people = loaded(ROOT / "playbooks/plugins/filter/people.py")
USERS: list[dict[str, Any]] = [
    {"name": "alice", "uid": 2001, "state": "present", "ssh_keys": ["ssh-ed25519 AAAA a"]},
    {"name": "bob", "uid": 2002},
    {"name": "carol", "uid": 2003, "state": "absent", "ssh_keys": ["ssh-ed25519 AAAA c"]},
]


def test_present_is_as_no_state_and_absent_is_nobody() -> None:
    cluster = Cluster(ROOT / "inventories/example", {"ictx_users": USERS, "ictx_state_dir": "/nonexistent"})
    found: dict[str, Any] = {}
    for role, used_in, hosts in cluster.uses("site.yml"):
        variables = cluster.variables(hosts[0], used_in, role)
        templar = Templar(cluster.loader, variables=variables)
        for name in (
            "storage_users",
            "slurm_users",
            "slurm_absent_users",
            "mlflow_users_people",
            "mlflow_users_absent",
        ):
            if name.startswith(role.get_name()):
                found[name] = templar.template(trusted(f"{{{{ {name} }}}}"))
        if role.get_name() == "common":
            found["keys"] = [user["name"] for user in templar.template(trusted("{{ _common_users_with_keys }}"))]
    people = ["alice", "bob"]
    assert found == {
        "keys": ["alice"],
        "storage_users": people,
        "slurm_users": people,
        "slurm_absent_users": {"carol": 2003},
        "mlflow_users_people": people,
        "mlflow_users_absent": ["carol"],
    }


def test_only_accounts_that_differ_are_changed() -> None:
    accounts = """alice:x:2001:2001::/home/alice:/bin/bash
bob:x:2002:2002::/home/bob:/bin/bash
--
ictx:x:2000:alice,dave,bob
alice:x:2001:
bob:x:2002:
--
/home/alice
/home/bob
"""

    def changed(text: str, users: list[dict[str, Any]] = USERS) -> list[str]:
        return [user["name"] for user in people.users_to_change(users, text, "ictx")]

    assert changed(accounts) == []
    assert changed("--\nictx:x:2000:\n--") == ["alice", "bob"]
    assert changed("--\n--") == ["alice", "bob"]
    # carol is absent in the inventory, but still on the node.
    assert changed("carol:x:2003:2003::/home/carol:/bin/bash\n" + accounts) == ["carol"]
    for before, after in [
        ("alice:x:2001:2001:", "alice:x:2009:2001:"),
        ("alice:x:2001:2001:", "alice:x:2001:100:"),
        ("/home/alice:/bin/bash", "/home/alice:/usr/sbin/nologin"),
        ("alice,dave", "dave"),
        ("\nalice:x:2001:\n", "\n"),
        ("\nalice:x:2001:\n", "\nalice:x:2009:\n"),
        ("--\n/home/alice\n", "--\n"),
    ]:
        assert before in accounts
        assert changed(accounts.replace(before, after)) == ["alice"], after


def test_the_jobs_and_the_association_of_a_user_who_is_gone_end(tmp_path: Path) -> None:
    for name in ("sacctmgr", "scancel"):
        (tmp_path / name).write_text(f"""#!/bin/sh
echo {name} "$*" >>{tmp_path}/calls
case "$*" in
*"show cluster"*) echo lab ;;
*"show association"*) printf '%s||1|||||||||||\\n' 'ictx|' 'ictx|bob' 'ictx|carol' ;;
esac
""")
        (tmp_path / name).chmod(0o755)
    variables = {
        "slurm_absent_users": {"carol": 2003, "dave": 2004},
        "slurm_users": ["bob"],
        "slurm_cluster_name": "lab",
        "slurm_operators": [],
        "slurm_qos": [],
    }
    path = {"environment": {"PATH": f"{tmp_path}:/usr/bin:/bin"}}
    done = play(tmp_path, [{"include_role": {"name": "slurm", "tasks_from": "accounts", "apply": path}}], variables)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if " show " not in line]
    assert "scancel --user=2003" in calls
    assert calls[-1] == "sacctmgr -i delete user where name=carol cluster=lab"
    assert "dave" not in str(calls)


def test_the_account_s_removal_leaves_the_home() -> None:
    tasks = yaml.safe_load((ROOT / "roles/common/tasks/users.yml").read_text())
    (user,) = (task["ansible.builtin.user"] for task in tasks if "ansible.builtin.user" in task)
    assert "remove" not in user
