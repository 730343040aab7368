"""Rules are valid; each alert fires with its cause, is silent without it, and names a remedy."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT
from programs import program

RULES = sorted((ROOT / "roles/prometheus/templates/rules").glob("*.yml"))
RUNBOOKS = ROOT / "docs/runbooks"
CASES: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "alerts.yml").read_text())


def groups() -> list[dict[str, Any]]:
    """Returns the groups of all rules."""
    return [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]


ALERTS = {rule["alert"]: rule for group in groups() for rule in group["rules"] if "alert" in rule}


FILES = {
    rule.get("alert"): file
    for file in RULES
    for group in yaml.safe_load(file.read_text())["groups"]
    for rule in group["rules"]
}


def test_rules_are_valid() -> None:
    done = subprocess.run([program("promtool"), "check", "rules", *RULES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_and_every_case_an_alert() -> None:
    assert set(CASES) == set(ALERTS)
    without = {name for name, cases in CASES.items() if {kind.split()[0] for kind in cases} != {"fires", "silent"}}
    assert without == {"Watchdog"}


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_with_its_cause_and_is_silent_without(alert: str, tmp_path: Path) -> None:
    tests = []
    for kind, case in CASES[alert].items():
        labels = f'alertname="{alert}",alertstate="firing",{case.get("labels", "")}'
        expression = f"count(ALERTS{{{labels}}}) or vector(0)"
        expected = [{"labels": "{}", "value": int(kind.startswith("fires"))}]
        look = {"expr": expression, "eval_time": case["at"], "exp_samples": expected}
        series = [{"series": name, "values": values} for name, values in case["series"].items()]
        step = case.get("step", "1m")
        tests.append({"name": kind, "interval": step, "input_series": series, "promql_expr_test": [look]})
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(FILES[alert])], "tests": tests}))
    done = subprocess.run([program("promtool"), "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_says_how_bad_it_is_what_is_wrong_and_where_to_read_on(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("critical", "warning", "none")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert "$value" in rule["annotations"]["description"]
    assert rule["annotations"]["runbook_url"] == f"[[ prometheus_runbook_url ]]/{alert}.md"


def test_an_alert_about_a_job_names_its_stage() -> None:
    about_jobs = {
        name: rule["annotations"]["description"]
        for name, rule in ALERTS.items()
        if name.startswith("Training") and "$labels.job_id" in rule["annotations"]["description"]
    }
    assert len(about_jobs) >= 6
    assert [name for name, text in about_jobs.items() if "$labels.stage" not in text] == []


@pytest.mark.parametrize("alert", ALERTS)
def test_an_alert_has_a_runbook(alert: str) -> None:
    text = (RUNBOOKS / f"{alert}.md").read_text()
    parts = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert text.startswith(f"# {alert}\n")
    assert parts == ["Meaning", "Confirm", "Resolve"]
    assert "```" in text or "    " in text, "a runbook must contain commands"


def test_there_is_no_runbook_without_an_alert() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} - {"README"} == set(ALERTS)
