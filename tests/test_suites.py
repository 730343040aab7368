"""Every test is part of one of the two suites."""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys

import pytest
from _pytest.mark.expression import Expression
from cluster import ROOT
from programs import loaded

suite = loaded(ROOT / "scripts/suite")


def selections(place: str) -> list[Expression]:
    """Returns the marker expressions of the suites' pytest commands for a folder."""
    commands = [shlex.split(step.command) for steps in suite.SUITES.values() for step in steps]
    return [
        Expression.compile(words[words.index("-m", words.index("pytest")) + 1] if "-m" in words[3:] else "")
        for words in commands
        if "pytest" in words and place in words
    ]


@pytest.mark.parametrize("place", ["tests", "workload/tests"])
def test_whatever_its_markers_a_test_is_in_a_suite(place: str) -> None:
    wanted = selections(place)
    marks = ("lab", "full", "hypothesis") if place == "tests" else ("full", "hypothesis")
    for count in range(len(marks) + 1):
        for chosen in itertools.combinations(marks, count):
            assert any(one.evaluate(lambda name, _has=chosen, **_: name in _has) for one in wanted), chosen


@pytest.mark.parametrize("name", suite.SUITES)
@pytest.mark.parametrize("place", ["tests", "workload/tests"])
def test_pytest_starts_in_every_suite(name: str, place: str) -> None:
    """In both folders the number of Hypothesis' examples depends on the suite's name."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {place!r}); import conftest"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"ICTX_SUITE": name}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_scenario_of_molecule_is_in_the_full_suite() -> None:
    commands = " ".join(step.command for step in suite.SUITES["full"])
    scenarios = {path.parent.name for path in (ROOT / "molecule").glob("*/molecule.yml")} - {"default"}
    assert {name for name in scenarios if f"--scenario-name {name}" not in commands} == set()
    assert "molecule test;" in commands.replace("molecule test ", "molecule test; ", 1)


def test_no_scenario_of_molecule_takes_the_lab_for_its_own() -> None:
    """Without these variables a scenario would use the lab's names, network and state."""
    lab = ROOT / "inventories/lab/group_vars/all/lab.yml"
    for inventory in (ROOT / "molecule").glob("*/inventory/hosts.yml"):
        assert (inventory.parent / "group_vars/all/lab.yml").resolve() == lab, inventory


def test_a_failed_step_fails_the_suite_and_later_steps_still_run(tmp_path, monkeypatch, capfd) -> None:
    steps = [
        suite.Step("code", "breaks", "echo this is why; exit 3"),
        suite.Step("code", "runs on", "echo $ICTX_SUITE"),
        suite.Step("lab", "stops the track", "exit 1", needed=True),
        suite.Step("lab", "is left out", "echo never", after="stops the track"),
    ]
    monkeypatch.setitem(suite.SUITES, "quick", steps)
    monkeypatch.setattr(suite, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(suite, "HISTORY", tmp_path / "history")
    monkeypatch.setattr("sys.argv", ["suite", "quick"])
    assert suite.main() == 1
    (report,) = (tmp_path / "history").glob("quick-*.md")
    results = {
        line.split(" | ")[1]: line.split(" | ")[-1].rstrip(" |") for line in report.read_text().splitlines()[4:8]
    }
    assert results == {"breaks": "failed", "runs on": "passed", "stops the track": "failed", "is left out": "not run"}
    printed = capfd.readouterr().out
    assert "this is why" in printed.split("=== FAILED: breaks")[1]
    assert "never" not in printed
    assert set(suite.last("quick")) == {"breaks", "runs on", "stops the track"}
