"""Renders the charts with helm, and finds the pods in the rendered objects."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
CHARTS = {"serving": ROOT / "charts" / "serving", "mlflow": ROOT / "charts" / "mlflow"}
CI = {f"{name}/{file.stem}": (name, file) for name, chart in CHARTS.items() for file in sorted(chart.glob("ci/*.yaml"))}
KUBERNETES = "1.37.0"
NAMESPACE = "ictx"
# libyaml's loader, if available, is ten times as fast.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Document = dict[str, Any]


class HelmError(Exception):
    """Helm's error output."""


@dataclass(frozen=True)
class Pod:
    """A pod or pod template, and the object that contains it."""

    owner: str
    labels: dict[str, str]
    annotations: dict[str, str]
    spec: Document

    @property
    def containers(self) -> list[Document]:
        """Returns all containers, with init containers."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def container(self, name: str) -> Document:
        """Returns a container by name."""
        return next(container for container in self.containers if container["name"] == name)


def program() -> str:
    """Returns the path of helm: from this Python's environment, else from PATH."""
    beside = Path(sys.executable).parent / "helm"
    found = str(beside) if beside.exists() else shutil.which("helm")
    assert found, "helm is missing: run `scripts/bootstrap test`"
    return found


def helm(*arguments: str) -> str:
    """Returns the output of helm."""
    done = subprocess.run([program(), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise HelmError(done.stdout + done.stderr)
    return done.stdout


@cache
def _documents(chart: Path, file: Path | None, values: str, kubernetes: str) -> list[Document]:
    more = ["--values", str(file)] if file else []
    for key, value in json.loads(values).items():
        more += ["--set-json", f"{key}={json.dumps(value)}"]
    text = helm("template", "ictx", str(chart), "--namespace", NAMESPACE, "--kube-version", kubernetes, *more)
    return [document for document in yaml.load_all(text, Loader=LOADER) if document]


def render(
    chart: Path, file: Path | None = None, values: Document | None = None, kubernetes: str = KUBERNETES
) -> list[Document]:
    """Returns the objects of a chart (cached: do not change them); `values`, by dotted path, override the file."""
    return _documents(chart, file, json.dumps(values or {}, sort_keys=True), kubernetes)


def name_of(document: Document) -> str:
    """Returns `Kind/name`."""
    return f"{document['kind']}/{document['metadata']['name']}"


def only(documents: list[Document], kind: str) -> Document:
    """Returns the one object of a kind."""
    (found,) = [document for document in documents if document["kind"] == kind]
    return found


def component(documents: list[Document], kind: str, name: str) -> Document:
    """Returns the one object of a kind that belongs to a component (`server`, `router`, …)."""
    label = "app.kubernetes.io/component"
    return only([document for document in documents if document["metadata"]["labels"].get(label) == name], kind)


def pods(documents: list[Document]) -> Iterator[Pod]:
    """Yields the pods of all objects: hooks, Deployments, Jobs and CronJobs."""
    for document in documents:
        template = document
        if document["kind"] == "CronJob":
            template = document["spec"]["jobTemplate"]["spec"]["template"]
        elif document["kind"] in {"Deployment", "Job"}:
            template = document["spec"]["template"]
        elif document["kind"] != "Pod":
            continue
        meta = template["metadata"]
        yield Pod(name_of(document), meta["labels"], meta.get("annotations", {}), template["spec"])
