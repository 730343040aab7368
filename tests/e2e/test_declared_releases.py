"""A canary that the inventory declares: its share of requests, and its removal with all of its objects."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from kubernetes import client, config
from lab import ROOT, STATE, wait_for
from serving import MODEL, NAMESPACE
from test_router import helm
from test_serving_releases import send, values

pytestmark = [pytest.mark.lab, pytest.mark.full]

NAME = "trial"
REMOVED = {"name": NAME, "state": "absent"}
SHARED = {"ictx-serving-registry", "ictx-serving-clients", "ictx-serving-tls"}


def serve(*releases: dict[str, Any]) -> str:
    """Runs the playbook with these additional releases; returns its output."""
    given = json.dumps({"ictx_serving_releases": releases})
    command = [str(ROOT / ".venv/bin/ansible-playbook"), "playbooks/serving.yml", "--extra-vars", given]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join(done.stdout.split())


def answered_by(_: int) -> str:
    """Returns the release that responds to a request."""
    status, answer, served_by = send("/v1/completions", {"model": MODEL, "prompt": "def f(", "max_tokens": 1})
    assert status == 200, answer
    return served_by


def its_own() -> list[str]:
    """Returns the objects of the namespace that belong to the release."""
    config.load_kube_config(str(STATE / "kubeconfig"))
    core, apps, net = client.CoreV1Api(), client.AppsV1Api(), client.NetworkingV1Api()
    queries = [
        core.list_namespaced_config_map, core.list_namespaced_persistent_volume_claim, core.list_namespaced_pod,
        core.list_namespaced_secret, core.list_namespaced_service, core.list_namespaced_service_account,
        apps.list_namespaced_deployment, net.list_namespaced_network_policy,
    ]  # fmt: skip
    names = [(query.__name__, each.metadata.name) for query in queries for each in query(NAMESPACE).items]
    return [f"{kind.removeprefix('list_namespaced_')} {name}" for kind, name in names if NAME in name]


def secrets() -> set[str]:
    """Returns the names of the namespace's Secrets."""
    return {each.metadata.name for each in client.CoreV1Api().list_namespaced_secret(NAMESPACE).items}


@pytest.fixture
def canary() -> Iterator[dict[str, Any]]:
    """Declares the served version again, with a tenth of the requests; always removed at the end."""
    assert its_own() == [], f"objects of an earlier run: run playbooks/serving.yml with {REMOVED}"
    try:
        yield {"name": NAME, "version": int(values()["model"]["version"]), "weight": 10}
    finally:
        serve(REMOVED)


def test_a_canary_is_declared_measured_and_removed(canary: dict[str, Any], record_property: Any) -> None:
    serve(canary)
    assert f"secret {NAME}-serving-tls" in its_own()
    wait_for("the canary", lambda: f"{NAME}-serving" in {answered_by(0) for _ in range(20)}, seconds=300)
    with ThreadPoolExecutor(8) as pool:
        shares = Counter(pool.map(answered_by, range(100)))
    record_property("requests", dict(shares))
    print(f"100 requests at 90/10: {dict(shares)}")
    # Each pod behind the address divides its own requests.
    assert 6 <= shares[f"{NAME}-serving"] <= 14, shares
    assert set(shares) == {"ictx-serving", f"{NAME}-serving"}

    text = serve()
    assert f"{NAME}: installed by an earlier run, not in ictx_serving_releases, and still running" in text
    assert json.loads(helm("list", "--filter", f"^{NAME}$", "--output=json")), "undeclared releases stay"
    assert f"{NAME}-serving" not in {answered_by(0) for _ in range(20)}

    text = serve(REMOVED)
    assert "still running" not in text
    assert json.loads(helm("list", "--all", "--filter", f"^{NAME}$", "--output=json")) == []
    wait_for("the end of its pods", lambda: not [name for name in its_own() if name.startswith("pod ")], seconds=120)
    assert its_own() == []
    assert secrets() >= SHARED
    assert not {"canary", "router"} & set(values()), "the address forwards nothing"
    assert f"{NAME}-serving" not in {answered_by(0) for _ in range(20)}
