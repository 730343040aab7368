"""Each drill writes a record, and the page of drills is generated from markers and records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import ROOT
from programs import loaded

page = loaded(ROOT / "scripts/drills")
MARK = '@pytest.mark.drill({!r}, keeps="jobs", acts="nobody")'
TESTS = f"""
import pytest

{MARK.format("a node dies")}
def test_recovers(drill):
    with drill.recovery(): pass

{MARK.format("a disk is full")}
def test_does_not_recover(drill):
    with drill.recovery(): assert 0

{MARK.format("is left out")}
def test_left_out(drill): pytest.skip("no lab")

@pytest.mark.parametrize("fault", [pytest.param(1, marks={MARK[1:].format("stands in a parameter")})])
def test_parameter(fault): pass
"""


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """The records of a run of TESTS with tests/conftest.py."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", ROOT, "-c", ROOT / "pyproject.toml"]
    command += ["--confcutdir", tmp_path, "-p", "conftest", tmp_path / "tests/test_some.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "ICTX_CACHE": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "1 failed, 2 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    return tmp_path / "suites/drills.jsonl"


def test_each_drill_that_ran_left_a_record(records: Path) -> None:
    found = [json.loads(line) for line in records.read_text().splitlines()]
    assert {about["fault"]: (about["passed"], about["seconds"]) for about in found} == {
        "a node dies": (True, 0),
        "a disk is full": (False, None),
        "stands in a parameter": (True, None),
    }


def test_the_page_has_the_newest_record_of_each_drill(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with records.open("a") as lines:
        lines.write('{"fault": "a node dies", "passed": true, "seconds": 71, "date": "2026-01-01", "commit": "abc"}\n')
        lines.write('{"fault": "of the past", "passed": true, "seconds": 1, "date": "2026-01-01", "commit": "abc"}\n')
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/drills.md").write_text(f"before\n{page.BEGIN}\n{page.END}\nafter\n")
    for name, value in {
        "ROOT": tmp_path,
        "RECORDS": records,
        "PAGE": tmp_path / "docs/drills.md",
        "RESULTS": tmp_path / "docs/drills.json",
    }.items():
        monkeypatch.setattr(page, name, value)
    monkeypatch.setattr(page.attacks, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["drills"])
    assert page.main() == 0
    text = page.PAGE.read_text()
    assert (
        "| a node dies | jobs | nobody | 71 s | passed, 2026-01-01, abc | `tests/test_some.py::test_recovers` |" in text
    )
    assert "| is left out | jobs | nobody |  | not run yet | `tests/test_some.py::test_left_out` |" in text
    assert "| a disk is full | jobs | nobody |  | **failed**, " in text
    assert "of the past" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    monkeypatch.setattr("sys.argv", ["drills", "--check"])
    assert page.main() == 0
    page.PAGE.write_text(text.replace("71 s", "7 s"))
    assert page.main() == 1
    # An older record of this machine does not replace a newer stored one.
    page.RESULTS.write_text(json.dumps({"a node dies": {"date": "2999-01-01"}}))
    assert page.newest(json.loads(page.RESULTS.read_text()), page.marked())["a node dies"] == {"date": "2999-01-01"}


def test_a_marker_without_what_it_keeps_or_twice_the_same_fault_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page.attacks, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    file = tmp_path / "tests/test_some.py"
    file.write_text('@pytest.mark.drill("a", acts="nobody")\ndef test_a(): pass\n')
    with pytest.raises(ValueError, match=r"test_some.py:1: expected drill\(fault, keeps=…, acts=…\)"):
        page.marked()
    file.write_text(2 * f"{MARK.format('a')}\ndef test_a(): pass\n")
    with pytest.raises(ValueError, match="fault 'a' is also used by"):
        page.marked()
