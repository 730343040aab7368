"""Two pods of the lab's model behind the router: routing by prefix, refused paths, and loss of a pod.

Without GPUs vLLM caches no prefixes of latent attention, so these tests check the routing, not the saved time.
"""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator

import pytest
from helm import program
from kubernetes import client, config
from lab import ROOT, STATE, wait_for
from serving import AUTHORITY, NAMESPACE, RELEASE, SERVER, Client, complete, endpoint, key

pytestmark = [pytest.mark.lab, pytest.mark.full]

ROUTER = SERVER.replace("component=server", "component=router")


def helm(*arguments: object) -> str:
    """Returns the output of helm."""
    words = [program(), *arguments, "--kubeconfig", STATE / "kubeconfig", "--namespace", NAMESPACE]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def upgrade(**values: object) -> None:
    """Changes values of the release and waits for the pods."""
    words = [word for name, value in values.items() for word in ("--set-json", f"{name}={json.dumps(value)}")]
    helm("upgrade", RELEASE, ROOT / "charts/serving", "--reset-then-reuse-values", "--wait", "--timeout", "15m", *words)


@pytest.fixture(scope="module")
def core() -> client.CoreV1Api:
    config.load_kube_config(str(STATE / "kubeconfig"))
    return client.CoreV1Api()


@pytest.fixture(scope="module", autouse=True)
def replicated() -> Iterator[None]:
    """Scales the lab's release to two pods; restores the release of the inventory at the end."""
    upgrade(replicaCount=2)
    try:
        yield
    finally:
        playbook = [ROOT / ".venv/bin/ansible-playbook", "playbooks/serving.yml"]
        subprocess.run([str(word) for word in playbook], check=True, cwd=ROOT)


def pods(core: client.CoreV1Api, selector: str) -> list[str]:
    """Returns the pods that are not terminating."""
    found = core.list_namespaced_pod(NAMESPACE, label_selector=selector).items
    return [pod.metadata.name for pod in found if not pod.metadata.deletion_timestamp]


def routed(core: client.CoreV1Api, metric: str, label: str) -> Counter[str]:
    """Returns the sum of both routers' counters by a label."""
    total: Counter[str] = Counter()
    for pod in pods(core, ROUTER):
        text = core.connect_get_namespaced_pod_proxy_with_path(f"{pod}:29000", NAMESPACE, "metrics")
        for labels, value in re.findall(rf"^{metric}{{(.*)}} (\S+)$", text, re.MULTILINE):
            total[dict(re.findall(r'(\w+)="([^"]*)"', labels))[label]] += int(float(value))
    return total


def test_a_beginning_stays_on_one_pod(core: client.CoreV1Api) -> None:
    """Ten prompts with a common prefix are routed to the same pod."""
    decisions, outcomes = "vllm_router_policy_decisions_total", "vllm_router_prefix_routing_decisions_total"
    before = routed(core, decisions, "worker"), routed(core, outcomes, "outcome")
    for number in range(10):
        status, text = complete(key(), prompt="def add(a, b):\n    return a + b\n" * 12 + str(number))
        assert status == 200, text
    went = routed(core, decisions, "worker") - before[0]
    assert list(went.values()) == [10]
    assert (routed(core, outcomes, "outcome") - before[1])["prefix_hit"] >= 9


def test_the_routers_own_paths_are_not_to_be_reached() -> None:
    context = ssl.create_default_context(cafile=str(AUTHORITY))
    for method, path in (
        ("GET", "/list_workers"),
        ("POST", "/add_worker?url=http://192.0.2.1:8000"),
        ("GET", "/workers"),
    ):
        for secret, status in ((key(), 404), ("not-the-key", 401)):
            headers = {"Authorization": f"Bearer {secret}"}
            request = urllib.request.Request(endpoint() + path, method=method, headers=headers)
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request, timeout=60, context=context)
            assert caught.value.code == status, (method, path)


def test_the_chart_tests_itself_through_the_router() -> None:
    assert "Phase:          Succeeded" in helm("test", RELEASE, "--timeout", "10m")


def test_a_pod_that_is_killed_costs_no_request(core: client.CoreV1Api) -> None:
    with Client() as steady:
        wait_for("the first answers", lambda: steady.answered > 4)
        victim = pods(core, SERVER)[0]
        core.delete_namespaced_pod(victim, NAMESPACE, grace_period_seconds=0)
        answered = steady.answered
        wait_for("answers after it", lambda: steady.answered > answered + 20)
    assert steady.failures == []
    wait_for("two pods that are ready", lambda: len(ready(core)) == 2, seconds=600)


def ready(core: client.CoreV1Api) -> list[str]:
    """Returns the addresses of the headless Service."""
    subsets = core.read_namespaced_endpoints("ictx-serving-replicas", NAMESPACE).subsets or []
    return [address.ip for subset in subsets for address in subset.addresses or []]


def test_a_roll_of_pods_and_routers_loses_no_request(core: client.CoreV1Api) -> None:
    before = set(pods(core, SERVER)), set(pods(core, ROUTER))
    with Client() as steady:
        wait_for("the first answers", lambda: steady.answered > 4)
        upgrade(**{"rollout.restartedAt": "drill", "router.circuitBreaker.failures": 4})
        wait_for("the old pods' end", lambda: not before[0] & set(pods(core, SERVER)), seconds=600)
        wait_for("the old routers' end", lambda: not before[1] & set(pods(core, ROUTER)), seconds=600)
        answered = steady.answered
        wait_for("answers of the new ones", lambda: steady.answered > answered + 5)
    assert steady.failures == []
