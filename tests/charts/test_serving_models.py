"""The serving chart with adapters, several models behind one address, and canaries."""

from __future__ import annotations

import json

import pytest
import yaml
from helm import CHARTS, Document, HelmError, component, name_of, only, pods, render

ADAPTERS = {"enabled": True, "serve": [{"name": "support", "model": "models:/ictx-support@champion"}]}


def test_adapters_are_loaded_by_a_container_whose_key_stays_in_the_pod() -> None:
    documents = render(CHARTS["serving"], values={"adapters": ADAPTERS, "pull.promotedOnly": True})
    pod = next(pods([component(documents, "Deployment", "server")]))
    vllm, adapters = pod.container("vllm"), pod.container("adapters")
    assert vllm["args"][vllm["args"].index("--enable-lora") :][:7] == [
        "--enable-lora", "--max-lora-rank", "16", "--max-loras", "4", "--max-cpu-loras", "16"
    ]  # fmt: skip
    environment = {each["name"]: each.get("value") for each in vllm["env"]}
    assert environment["ICTX_ADMIN"] == "/run/ictx"
    assert {each["name"]: each.get("value") for each in adapters["env"]}["ICTX_PROMOTED_ONLY"] == "true"
    mounts = {each["mountPath"]: each for each in vllm["volumeMounts"]}
    assert mounts["/run/ictx"]["readOnly"]
    assert mounts["/adapters"]["readOnly"]
    assert "/etc/ictx/keys" not in {each["mountPath"] for each in adapters["volumeMounts"]}
    volumes = {each["name"]: each for each in pod.spec["volumes"]}
    assert volumes["adapters-state"]["emptyDir"]["medium"] == "Memory"
    listed = next(each for each in documents if name_of(each) == "ConfigMap/ictx-serving-adapters")
    assert yaml.safe_load(listed["data"]["adapters.yaml"]) == {"support": "models:/ictx-support@champion"}


def test_another_list_of_adapters_rolls_no_pod() -> None:
    before, after = (
        component(render(CHARTS["serving"], values={"adapters": values}), "Deployment", "server")["spec"]["template"]
        for values in (ADAPTERS, {**ADAPTERS, "serve": []})
    )
    assert before == after
    assert "ictx-serving-adapters" not in json.dumps(render(CHARTS["serving"]))


CANARY = {"service": "next-serving", "weight": 10}


def backends_of(documents: list[Document]) -> tuple[str, dict[str, int]]:
    """Returns this release's weight and the other releases', from the router's arguments."""
    (front,) = [
        {each["name"]: each.get("value", "") for each in container["env"]}
        for pod in pods(documents)
        for container in pod.containers
        if container["name"] == "front"
    ]
    return front["ICTX_WEIGHT"], {each["url"]: each["weight"] for each in json.loads(front["ICTX_BACKENDS"])}


def test_a_canary_is_divided_by_the_router_where_there_is_no_edge() -> None:
    documents = render(CHARTS["serving"], values={"canary": CANARY, "router.backends": [{"service": "large"}]})
    assert backends_of(documents) == ("90", {"https://large:8000": 100, "https://next-serving:8000": 10})
    policy = next(each for each in documents if name_of(each) == "NetworkPolicy/ictx-serving-router")
    allowed = [peer["podSelector"] for rule in policy["spec"]["egress"] for peer in rule.get("to", [])]
    assert {"key": "app.kubernetes.io/component", "operator": "In", "values": ["server", "router"]} in [
        expression for selector in allowed for expression in selector.get("matchExpressions", [])
    ]


def test_a_canary_is_divided_by_the_gateway_or_the_ingress_where_there_is_one() -> None:
    route = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "caConfigMap": "ca"}}
    documents = render(CHARTS["serving"], values={"canary": CANARY, **route})
    (rule,) = only(documents, "HTTPRoute")["spec"]["rules"]
    assert {each["name"]: each["weight"] for each in rule["backendRefs"]} == {"ictx-serving": 90, "next-serving": 10}
    policies = [each for each in documents if each["kind"] == "BackendTLSPolicy"]
    assert {each["spec"]["validation"]["hostname"] for each in policies} == {"ictx-serving", "next-serving"}
    assert not [pod for pod in pods(documents) if "router" in pod.owner], "requests are divided only once"

    ingress = {"ingress": {"enabled": True, "className": "nginx", "host": "a.example.org", "annotations": {"a/b": "c"}}}
    documents = render(CHARTS["serving"], values={"canary": CANARY, **ingress})
    second = next(each for each in documents if name_of(each) == "Ingress/ictx-serving-canary")
    ours = {"nginx.ingress.kubernetes.io/canary": "true", "nginx.ingress.kubernetes.io/canary-weight": "10", "a/b": "c"}
    assert ours.items() <= second["metadata"]["annotations"].items()
    (path,) = second["spec"]["rules"][0]["http"]["paths"]
    assert path["backend"]["service"]["name"] == "next-serving"

    both = render(CHARTS["serving"], values={"canary": {**CANARY, "by": "router"}, **ingress})
    assert backends_of(both) == ("90", {"https://next-serving:8000": 10})
    assert [name_of(each) for each in both if each["kind"] == "Ingress"] == ["Ingress/ictx-serving"]


def test_without_a_canary_nothing_is_divided() -> None:
    route = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}}
    (rule,) = only(render(CHARTS["serving"], values=route), "HTTPRoute")["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": "ictx-serving", "port": 8000}]


@pytest.mark.parametrize("name", ["", "traefik"])
def test_an_ingress_that_cannot_divide_requests_leaves_it_to_the_router(name: str) -> None:
    """Traefik, K3s's default, would choose between two Ingresses of the same host and path."""
    ingress = {"ingress": {"enabled": True, "className": name, "host": "a.example.org"}}
    route = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]}}
    for edges in (ingress, {**ingress, **route}):
        documents = render(CHARTS["serving"], values={"canary": CANARY, **edges})
        assert [name_of(each) for each in documents if each["kind"] == "Ingress"] == ["Ingress/ictx-serving"]
        assert backends_of(documents) == ("90", {"https://next-serving:8000": 10})
    documents = render(CHARTS["serving"], values={"canary": {**CANARY, "by": "edge"}, **ingress})
    assert "Ingress/ictx-serving-canary" in map(name_of, documents)


def test_a_canary_is_another_release_with_its_own_objects() -> None:
    route = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "caConfigMap": "ca"}}
    with pytest.raises(HelmError, match=r'canary\.service: "ictx-serving" is this release'):
        render(CHARTS["serving"], values={"canary.service": "ictx-serving", **route})
    own = {name_of(each) for each in render(CHARTS["serving"], values={"canary": CANARY, **route})}
    canary = {name_of(each) for each in render(CHARTS["serving"], values={"fullnameOverride": "next-serving", **route})}
    assert own & canary == set()
