"""Grafana uses every key of its provisioning files; it does not report unknown keys itself."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from cluster import ROOT, Cluster

SCHEMAS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("grafana_provisioning.yml").read_text())
TEMPLATES = ROOT / "roles/grafana/templates"
FILES = ("datasources", "dashboards", "contact_points")
# The second name has characters that are not valid in an identifier.
POINTS = [{"name": "ops", "webhook_url": "https://chat.example.org/hook?a=1&b=2"},
          {"name": "On call: team #1", "webhook_url": "https://pager.example.org/$1"}]  # fmt: skip
ALERTMANAGERS = ["https://192.0.2.41:9093", "https://192.0.2.42:9093"]


@cache
def provisioned(inventory: str, file: str, *, more: bool = False) -> list[Any]:
    """Returns the file's content for each host of Grafana; `more` enables every optional part of the role."""
    state = {"lab_state_dir": "/nowhere", "ictx_state_dir": "/nowhere"}
    cluster, contents = Cluster(ROOT / "inventories" / inventory, state), []
    for role, play, hosts in cluster.uses("playbooks/monitoring.yml"):
        if role.get_name() == "grafana":
            for host in hosts:
                variables = cluster.variables(host, play, role)
                if more:
                    variables |= {"grafana_contact_points": POINTS, "grafana_alertmanagers": ALERTMANAGERS}
                contents.append(yaml.safe_load(cluster.render(TEMPLATES / f"{file}.yml.j2", variables)))
    return contents


def problems(file: str, content: Any) -> list[str]:
    """Returns the places that violate the schema."""
    schema = jsonschema.Draft202012Validator({**SCHEMAS[file], "definitions": SCHEMAS["definitions"]})
    return [f"{error.json_path}: {error.message}" for error in schema.iter_errors(content)]


@pytest.mark.parametrize("more", [False, True], ids=["as it is", "with all that can be added"])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("inventory", ["lab", "example"])
def test_a_provisioning_file_is_what_grafana_reads(inventory: str, file: str, more: bool) -> None:
    contents = provisioned(inventory, file, more=more)
    assert contents, "no host has the role"
    for content in contents:
        assert problems(file, content) == []


def test_identifiers_are_each_one_of_a_kind() -> None:
    for content in provisioned("example", "datasources", more=True):
        identifiers = [source["uid"] for source in content["datasources"]]
        assert len(identifiers) == len(set(identifiers)) == 1 + len(ALERTMANAGERS)
    for content in provisioned("example", "contact_points", more=True):
        identifiers = [receiver["uid"] for point in content["contactPoints"] for receiver in point["receivers"]]
        assert len(identifiers) == len(set(identifiers)) == len(POINTS)
        assert [point["name"] for point in content["contactPoints"]] == [point["name"] for point in POINTS]
        # Grafana expands variables with `$`; `$$` is a literal `$`.
        assert content["contactPoints"][1]["receivers"][0]["settings"]["url"] == "https://pager.example.org/$$1"


@pytest.mark.parametrize(
    ("file", "place", "wrong", "reported"),
    [
        ("datasources", "datasources", {"is_default": True}, "'is_default' was unexpected"),
        ("datasources", "datasources", {"url": "prometheus:9090"}, "'prometheus:9090' does not match"),
        ("datasources", "datasources", {"jsonData": {"httpMethd": "POST"}}, "'httpMethd' was unexpected"),
        ("datasources", "datasources", {"secureJsonData": {"password": "x"}}, "'password' is not one of"),
        ("dashboards", "providers", {"path": "/d"}, "'path' was unexpected"),
        ("contact_points", "contactPoints", {"receivers": []}, "[] should be non-empty"),
    ],
)
def test_a_wrong_provisioning_file_is_reported(file: str, place: str, wrong: dict[str, Any], reported: str) -> None:
    content = copy.deepcopy(provisioned("example", file, more=True)[0])
    content[place][0] |= wrong
    assert any(reported in problem for problem in problems(file, content)), problems(file, content)
