"""The SLURM tier and its metrics with the packages of Debian 13."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from typing import Any

import pytest
from nodes import COMPUTE, CONTROLLERS, accounts, as_user, node, played, states, wait_for


def test_the_nodes_are_what_the_scenario_is_about() -> None:
    for name in (*CONTROLLERS, *COMPUTE):
        assert (node(name).system_info.distribution, node(name).system_info.codename) == ("debian", "trixie")
        assert node(name).package("slurm-client").version.startswith("24.11.")


@pytest.mark.parametrize(
    ("name", "service"),
    [("ctl", name) for name in ("munge", "mariadb", "slurmdbd", "slurmctld", "prometheus", "prometheus-node-exporter")]
    + [("ctl2", name) for name in ("munge", "slurmctld", "prometheus-node-exporter")]
    + [(name, service) for name in COMPUTE for service in ("munge", "slurmd", "prometheus-node-exporter")],
)
def test_service_runs_and_starts_at_boot(name: str, service: str) -> None:
    found = node(name).service(service)
    assert found.is_running
    assert found.is_enabled
    assert not node(name).check_output("systemctl --failed --no-legend --plain")


def test_packages_come_through_the_site_s_proxy() -> None:
    log = node("ctl").file("/var/log/site-proxy.log").content_string
    for name in ("ctl2", *COMPUTE):
        address = node("ctl").check_output(f"getent ahostsv4 {name}").split()[0]
        assert re.search(rf"Connect .*\b{re.escape(address)}\b", log), f"{name} went past the proxy"
    assert "GET http" in log


@pytest.mark.parametrize(
    ("name", "unit", "files"),
    [("ctl", "slurmctld", 300000), ("ctl2", "slurmctld", 300000), ("n1", "slurmd", 200000), ("n2", "munge", 4096)],
)
def test_a_unit_runs_with_the_site_s_settings(name: str, unit: str, files: int) -> None:
    # Checks the unit, not the process, whose limit the machine may lower for containers.
    shown = node(name).check_output(f"systemctl show --property=ActiveState,LimitNOFILE,NeedDaemonReload {unit}")
    assert set(shown.splitlines()) == {"ActiveState=active", f"LimitNOFILE={files}", "NeedDaemonReload=no"}


@pytest.mark.parametrize("name", COMPUTE)
def test_systemd_knows_when_slurmd_is_ready(name: str) -> None:
    shown = node(name).check_output("systemctl show --property=Type,NotifyAccess,StatusText,Delegate slurmd")
    assert "Type=notify\n" in f"{shown}\n"
    assert "Delegate=yes" in shown


def test_a_user_s_job_runs_on_every_node_and_is_in_the_accounts() -> None:
    assert states() == {"n1": "idle", "n2": "idle"}
    job = as_user(
        "sbatch --parsable --wait --nodes=2 --output=/shared/runs/researcher/hostnames --wrap='srun hostname'"
    )
    assert sorted(node("ctl").file("/shared/runs/researcher/hostnames").content_string.split()) == COMPUTE
    wait_for("the job in the accounts", lambda: accounts(job, "State") == "COMPLETED")
    assert accounts(job, "User,Account,NodeList,ExitCode") == "researcher|ictx|n[1-2]|0:0"


def test_prometheus_reaches_every_target_and_has_the_jobs() -> None:
    password = os.path.join(os.environ["ICTX_LAB_STATE"], "secrets/prometheus_password")
    with open(password, encoding="utf-8") as file:
        opened = f"curl --silent --fail --globoff --cacert /etc/ictx/tls/ca.crt --user admin:{file.read().strip()}"
    address = node("ctl").check_output("hostname --ip-address").split()[0]

    def asked(path: str) -> dict[str, Any]:
        answer = json.loads(node("ctl").check_output(f"{opened} 'https://{address}:9090/api/v1/{path}'"))
        return dict(answer["data"])

    # Not the metric `up`, which still has targets of the package's own configuration for five minutes.
    def down() -> list[str]:
        targets = asked("targets?state=active")["activeTargets"]
        wrong = [f"{target['scrapeUrl']}: {target['lastError']}" for target in targets if target["health"] != "up"]
        missing = {"blackbox", "endpoints", "mysqld", "node", "prometheus"} - {row["labels"]["job"] for row in targets}
        series = asked("query?query=mysql_up==1")["result"]
        return [*wrong, *sorted(missing), *([] if series else ["mysql_up is not 1"])]

    with suppress(AssertionError):
        wait_for("every target up", lambda: not down())
    assert down() == []


def test_a_check_run_finds_nothing_to_change() -> None:
    recap = dict(
        re.findall(r"^(\w+) +: ok=\d+ +changed=(\d+)", played("--check", os.environ["MOLECULE_CHECK"]), re.MULTILINE)
    )
    assert recap == dict.fromkeys(["ctl", "ctl2", "localhost", "n1", "n2"], "0")
