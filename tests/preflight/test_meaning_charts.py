# ruff: noqa: E501 (each problem is one line, as users see it)
"""Preflight rejects chart values that Helm would reject, and accepts the values of the charts' tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster import ROOT
from programs import loaded

meaning = loaded(ROOT / "playbooks/plugins/filter/meaning.py")
FILES = sorted((ROOT / "charts").glob("*/ci/*.yaml"))


def found(**variables: Any) -> list[str]:
    problems = meaning.meaning_problems({"k1": variables}, {"all": ["k1"]})
    return [f"{name}: {text}" for name, text, _ in problems]


def release(**values: Any) -> dict[str, Any]:
    return {"ictx_serving_releases": [{"name": "sft", "model": "m", "values": values}]}


README = "charts/serving/README.md lists the values"
WRONG = {
    "ictx_serving_releases: sft: values.replicaCont is not a value of charts/serving; did you mean replicaCount?": release(replicaCont=2),
    "ictx_serving_releases: sft: values.vllm.gpuMemory is not a value of charts/serving": release(vllm={"gpuMemory": 0.9}),
    f"ictx_serving_releases: sft: values.replicaCount is invalid: 'two' is not of type 'integer': {README}": release(replicaCount="two"),
    f"ictx_serving_values: service.type is invalid: 'ClusterIP' is not one of ['NodePort', 'LoadBalancer']: {README}": {
        "ictx_serving_values": {"service": {"nodePort": 30800}}},
    "ictx_serving_values: preset is invalid: 'a100' is not one of [": {"ictx_serving_values": {"preset": "a100"}},
    "ictx_judge_values: gpu.counts is not a value of charts/serving; did you mean count?": {"ictx_judge_values": {"gpu": {"counts": 1}}},
    "ictx_mlflow_values: replicaCount is invalid: 2 is greater than the maximum of 1: charts/mlflow/README.md": {
        "ictx_mlflow_values": {"replicaCount": 2, "database": {"type": "sqlite"}}},
    "ictx_mlflow_values: database.postgresql.existingSecret is invalid": {"ictx_mlflow_values": {"database": {"type": "postgresql"}}},
}  # fmt: skip
RIGHT: dict[str, dict[str, Any]] = {
    "none": {"ictx_serving_values": {}, **release()},
    "a value removed": {"ictx_serving_values": {"vllm": {"maxModelLen": None}, "replicaCount": None}},
    "a removed release": {"ictx_serving_releases": [{"name": "sft", "state": "absent", "values": {"replicaCont": 2}}]},
    "a release": release(replicaCount=2, model={"servedName": "sft"}, vllm={"dtype": "float32"}),
}


@pytest.mark.parametrize(("text", "given"), WRONG.items())
def test_what_helm_refuses_is_named_with_what_to_do(text: str, given: dict[str, Any]) -> None:
    lines = found(**given)
    assert [line for line in lines if line.startswith(text)], lines


@pytest.mark.parametrize("given", RIGHT.values(), ids=RIGHT)
def test_what_helm_takes_passes(given: dict[str, Any]) -> None:
    assert found(**given) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parts[-3]}-{file.stem}")
def test_values_of_the_charts_own_tests_pass(file: Path) -> None:
    # Each chart's values by the variable that sets them.
    assert [
        line
        for line in found(**{f"ictx_{file.parts[-3]}_values": yaml.safe_load(file.read_text())})
        if "is invalid" in line or "is not a value" in line
    ] == []


def test_a_control_host_without_the_validator_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment from before the validator was in the lock file."""
    charts = loaded(ROOT / "playbooks/plugins/filter/meaning_charts.py")
    monkeypatch.setitem(sys.modules, "jsonschema.validators", None)
    site = meaning.Inventory({"k1": release(replicaCount=2)}, {"all": ["k1"]})
    ((where, text, _),) = charts.values(site)
    assert where == "ictx_serving_releases"
    assert text.startswith("cannot be validated on this control host (")
    assert text.endswith("): run scripts/bootstrap control")
