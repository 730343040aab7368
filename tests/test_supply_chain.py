"""Every downloaded package has a hash in a lock, and known vulnerabilities of locked packages are reported."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT

M9 = pytest.mark.attack(
    "M9",
    "An attacker who controls a package index sends another uv, torch or hatchling",
    before="installed: these three downloads had no hash",
    now="rejected: a lock file has the hash of each download",
)
LOCKS = sorted([*ROOT.glob("requirements/*.txt"), *ROOT.glob("workload/requirements/*.txt")])


def load_audit() -> Any:
    """Returns scripts/audit as a module."""
    loader = importlib.machinery.SourceFileLoader("audit", str(ROOT / "scripts/audit"))
    spec = importlib.util.spec_from_loader("audit", loader)
    assert spec
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


AUDIT = load_audit()


@M9
@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_locked_package_has_a_hash(lock: Path) -> None:
    entries = re.split(r"\n(?=[A-Za-z0-9])", re.sub(r"^#.*\n", "", lock.read_text(), flags=re.M))
    assert [entry.split("\n")[0] for entry in entries if entry.strip() and "--hash=sha256:" not in entry] == []


@M9
def test_every_installer_asks_for_hashes_or_no_index() -> None:
    files = [ROOT / "scripts/bootstrap", *ROOT.glob("images/*/Dockerfile"), *ROOT.glob("roles/*/tasks/*.yml")]
    for file in [*files, ROOT / "roles/image_bake/vars/main.yml"]:
        # Join commands that span several lines.
        text = re.sub(r"\\\n|\n\s+(?=-)", " ", file.read_text())
        for line in text.splitlines():
            if re.search(r"\bpip[\w\"']* (install|wheel|download)\b", line) and not line.lstrip().startswith("#"):
                safe = re.search(r"--require-hashes|--no-index", line) or re.search(
                    r"--no-deps --no-build-isolation", line
                )
                assert safe, f"{file.name}: {line}"


@M9
def test_what_builds_the_workload_is_what_its_project_names() -> None:
    wanted = re.findall(r'^requires = \["(\S+)"\]', (ROOT / "workload/pyproject.toml").read_text(), re.M)
    assert wanted[0] in (ROOT / "workload/requirements/build.in").read_text()
    for lock in ("workload/requirements/build.txt", "requirements/control.txt", "requirements/test.txt"):
        assert f"\n{wanted[0]} " in (ROOT / lock).read_text()


def test_a_vulnerability_is_named_with_its_lock_and_what_fixes_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Foo_Bar==1.0 ; x \\\n    --hash=sha256:0\nother==2\nnew==3\nfine==1\n")
    packages = AUDIT.locked([tmp_path / "a.txt"])
    advisories = {
        "accepted": {"CVE-2": "not reachable"},
        "packages": {
            "foo-bar": {"1.0": [{"id": "CVE-1", "fixed": ["1.1"]}]},
            "other": {"2": [{"id": "CVE-2", "fixed": []}]},
            "new": {"2": []},
            "fine": {"1": []},
        },
    }
    assert AUDIT.check(packages, advisories) == (["foo-bar==1.0 (a.txt): CVE-1, fixed in 1.1"], ["new==3"])


def test_what_could_not_be_checked_is_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "advisories.json").write_text(json.dumps({"accepted": {}, "packages": {}, "refreshed": "never"}))
    monkeypatch.setattr(AUDIT, "ADVISORIES", tmp_path / "advisories.json")
    monkeypatch.setattr(AUDIT.sys, "argv", ["audit"])
    assert AUDIT.main() == 0
    output = capsys.readouterr().out
    assert re.search(r"^0 of \d+ locked packages checked against advisories of never$", output, re.M)
    assert "not checked (not in requirements/advisories.json; run scripts/audit refresh): " in output


def test_accepted_vulnerabilities_have_a_reason() -> None:
    advisories = json.loads((ROOT / "requirements/advisories.json").read_text())
    assert all(len(reason) > 10 for reason in advisories["accepted"].values())
