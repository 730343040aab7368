"""Dashboards: their JSON is up to date with the code, Grafana can read it, and every panel has its description."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT

FILES = sorted((ROOT / "roles/grafana/files/dashboards").glob("*.json"))
NAMES = {"fleet", "slurm", "gpu", "training", "serving", "kubernetes", "nodes", "models"}

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="grafana-foundation-sdk needs Python 3.11")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Returns the content of each dashboard."""
    return json.loads(request.param.read_text())


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the panels of a dashboard, without rows."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_there_is_a_dashboard_for_everything() -> None:
    assert {path.stem for path in FILES} == NAMES


def test_the_files_are_what_the_code_makes() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/dashboards", "check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_grafanas_types_read_it_and_write_the_same(dashboard: dict[str, Any]) -> None:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
    assert again == dashboard


def test_every_panel_explains_itself(dashboard: dict[str, Any]) -> None:
    assert dashboard["description"]
    for panel in panels(dashboard):
        assert panel["title"], panel
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert all(target["expr"] for target in panel["targets"]), panel["title"]


def test_panels_have_their_own_numbers_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert numbers == sorted(set(numbers))
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} overlaps {taken[x, y]}"
                taken[x, y] = panel["title"]


def test_every_variable_that_a_query_uses_is_one_of_the_dashboard(dashboard: dict[str, Any]) -> None:
    have = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert {"datasource", "cluster"} <= have
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([panel["targets"] for panel in panels(dashboard)])))
    assert used - {"__rate_interval"} <= have


def test_links_lead_to_dashboards_that_exist(dashboard: dict[str, Any]) -> None:
    known = {json.loads(path.read_text())["uid"] for path in FILES}
    assert set(re.findall(r"/d/([\w-]+)", json.dumps(dashboard))) <= known


def test_dashboards_are_annotated_with_what_happened(dashboard: dict[str, Any]) -> None:
    names = {annotation["name"] for annotation in dashboard["annotations"]["list"]}
    assert names == {"Deploys", "Drains", "Job starts and requeues"}


def test_the_role_installs_every_dashboard() -> None:
    text = (Path(ROOT) / "roles/grafana/vars/main.yml").read_text()
    listed = re.findall(r"\[(.+)\]$", text.split("_grafana_folders:")[1], re.MULTILINE)
    assert {name.strip() for names in listed for name in names.split(",")} == NAMES
