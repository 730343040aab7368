"""How clients reach the charts' servers (Ingress, HTTPRoute, Services), and how the pods reach other systems."""

from __future__ import annotations

import fnmatch
import re
from typing import Any

import kubernetes_validate
import pytest
from helm import CHARTS, Document, HelmError, Pod, component, name_of, only, pods, render


def server(chart: str, values: Document) -> Pod:
    """Returns the server's pod."""
    return next(pods([component(render(CHARTS[chart], None, values), "Deployment", "server")]))


def option(container: Document, name: str) -> str:
    """Returns the value of an argument."""
    return str(container["args"][container["args"].index(name) + 1])


INGRESS = {"enabled": True, "host": "mlflow.example.org"}


@pytest.mark.parametrize(
    ("values", "origins"),
    [
        ({"ingress": {**INGRESS, "tlsSecret": "a"}}, ["https://mlflow.example.org"]),
        # TLS may end at a load balancer, or with the controller's default certificate.
        ({"ingress": INGRESS}, ["https://mlflow.example.org", "http://mlflow.example.org"]),
        ({"auth.oidc.url": "https://m.example.org:8443/x"}, ["https://m.example.org:8443"]),
        ({"server.corsAllowedOrigins": ["https://a"], "auth.oidc.url": "https://m"}, ["https://a", "https://m"]),
    ],
)
def test_mlflow_accepts_requests_of_its_own_pages(values: Document, origins: list[str]) -> None:
    """MLflow rejects POST requests with an Origin that is not listed, even its own; its pages search by POST."""
    container = server("mlflow", values).container("mlflow")
    assert option(container, "--cors-allowed-origins").split(",") == origins
    assert "--cors-allowed-origins" not in server("mlflow", {}).container("mlflow")["args"]


@pytest.mark.parametrize(
    ("host", "accepted"),
    [
        ("10.42.0.7:5000", True),
        ("100.64.3.7:5000", True),
        ("100.99.3.7:5000", True),
        ("100.127.3.7:5000", True),
        ("100.63.3.7:5000", False),
        ("100.128.3.7:5000", False),
        ("[fd42:42::5]:5000", True),
        ("[2001:db8::5]:5000", False),
        ("mlflow.example.org", False),
    ],
)
def test_prometheus_scrapes_mlflow_at_the_address_of_a_pod(host: str, accepted: bool) -> None:
    """Pods have addresses of RFC 1918, RFC 6598 (Amazon, Google) or RFC 4193; MLflow matches as here."""
    listed: list[Any] = option(server("mlflow", {}).container("mlflow"), "--allowed-hosts").split(",")
    assert any(fnmatch.fnmatch(host, each) if "*" in each else host == each for each in listed) is accepted


POSTGRESQL = {
    "database": {"type": "postgresql", "postgresql": {"existingSecret": "db", "caSecret": "db-ca"}},
    "artifacts": {"type": "s3", "s3": {"uri": "s3://a/b", "existingSecret": "s3"}},
    "backup.enabled": True,
    "gc.enabled": True,
    "restore.snapshot": "latest",
}


def test_every_pod_that_uses_the_database_verifies_it() -> None:
    using = []
    for pod in pods(render(CHARTS["mlflow"], None, POSTGRESQL)):
        for container in pod.containers:
            env = {each["name"]: each.get("value") for each in container.get("env", [])}
            if "MLFLOW_BACKEND_STORE_URI" not in env:
                continue
            using.append(container["name"])
            assert (env["PGSSLMODE"], env["PGSSLROOTCERT"]) == ("verify-full", "/etc/mlflow-database/ca.crt")
            assert {"name": "database", "mountPath": "/etc/mlflow-database", "readOnly": True} in container[
                "volumeMounts"
            ]
            (volume,) = [volume["secret"] for volume in pod.spec["volumes"] if volume["name"] == "database"]
            assert volume == {"secretName": "db-ca", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    assert sorted(using) == ["backup", "gc", "migrate", "mlflow", "prepare", "restore"]
    with pytest.raises(HelmError, match="already has a volume"):
        render(CHARTS["mlflow"], None, {"extraVolumes": [{"name": "database", "emptyDir": {}}]})
    assert "mlflow-database" not in str(render(CHARTS["mlflow"], None, {"database.postgresql.caSecret": "db-ca"}))


def test_the_migration_reaches_the_database_in_a_namespace_that_denies_egress() -> None:
    """Helm creates the release's own policies after the hook."""
    documents = render(CHARTS["mlflow"], None, POSTGRESQL)
    job = next(each for each in documents if name_of(each) == "Job/ictx-mlflow-migrate")
    policy = next(each for each in documents if name_of(each) == "NetworkPolicy/ictx-mlflow-migrate")
    hooks = [each["metadata"]["annotations"] for each in (policy, job)]
    assert hooks[0]["helm.sh/hook"] == hooks[1]["helm.sh/hook"]
    assert int(hooks[0]["helm.sh/hook-weight"]) < int(hooks[1].get("helm.sh/hook-weight", 0))
    (pod,) = pods([job])
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod.labels.items()
    ports = [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]
    assert {53, 5432} <= set(ports)
    off = render(CHARTS["mlflow"], None, {**POSTGRESQL, "networkPolicy.enabled": False})
    assert not [each for each in off if each["kind"] == "NetworkPolicy"]


def test_mlflow_reaches_the_credentials_of_its_role() -> None:
    def endpoints(secret: str) -> set[str]:
        documents = render(CHARTS["mlflow"], None, {**POSTGRESQL, "artifacts.s3.existingSecret": secret})
        policy = next(each for each in documents if name_of(each) == "NetworkPolicy/ictx-mlflow")
        rules = [rule for rule in policy["spec"]["egress"] if rule["ports"] == [{"port": 80, "protocol": "TCP"}]]
        return {peer["ipBlock"]["cidr"] for rule in rules for peer in rule["to"]}

    assert {"169.254.169.254/32", "169.254.170.23/32", "fd00:ec2::23/128"} <= endpoints("")
    assert endpoints("s3") == set()


ROUTE = {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["llm.example.org"]}


@pytest.mark.parametrize(
    ("timeout", "rendered"), [(None, {"request": "0s"}), ("1h30m", {"request": "1h30m"}), ("", None)]
)
def test_a_gateway_does_not_end_long_requests(timeout: str | None, rendered: Document | None) -> None:
    """Without a timeout in the route, Envoy Gateway ends requests after 15 seconds."""
    values = {"httpRoute": {**ROUTE, **({} if timeout is None else {"timeout": timeout})}}
    (rule,) = only(render(CHARTS["serving"], None, values), "HTTPRoute")["spec"]["rules"]
    assert rule.get("timeouts") == rendered


@pytest.mark.parametrize("timeout", ["30", "1d", "1h30m5s9ms1h"])
def test_a_timeout_is_a_duration_of_the_gateway_api(timeout: str) -> None:
    with pytest.raises(HelmError, match=r"httpRoute\.timeout"):
        render(CHARTS["serving"], None, {"httpRoute": {**ROUTE, "timeout": timeout}})


SERVICE = {
    "type": "LoadBalancer",
    "externalTrafficPolicy": "Local",
    "loadBalancerClass": "io.cilium/node",
    "loadBalancerSourceRanges": ["192.0.2.0/24", "2001:db8::/32"],
    "ipFamilyPolicy": "RequireDualStack",
    "ipFamilies": ["IPv6", "IPv4"],
}


@pytest.mark.parametrize("chart", CHARTS)
def test_a_service_has_the_settings_of_its_type(chart: str) -> None:
    def spec(**values: Any) -> Document:
        documents = render(CHARTS[chart], None, {"service": {**SERVICE, **values}})
        found: Document = next(each for each in documents if name_of(each) == f"Service/ictx-{chart}")
        kubernetes_validate.validate(found, "1.29", strict=True)
        return {key: found["spec"][key] for key in SERVICE if key in found["spec"]}

    assert spec() == SERVICE
    families = {key: SERVICE[key] for key in ("ipFamilyPolicy", "ipFamilies")}
    assert spec(type="NodePort") == {"type": "NodePort", "externalTrafficPolicy": "Local", **families}
    assert spec(type="ClusterIP") == {"type": "ClusterIP", **families}


@pytest.mark.parametrize(
    ("values", "affinity"),
    [
        ({}, None),
        ({"replicaCount": 2}, "ClientIP"),
        # Amazon's load balancers reject ClientIP.
        ({"replicaCount": 2, "service.type": "LoadBalancer", "service.sessionAffinity": "None"}, "None"),
        ({"service.sessionAffinity": "ClientIP"}, "ClientIP"),
    ],
)
def test_clients_stay_with_a_router_unless_the_load_balancer_cannot(values: Document, affinity: str | None) -> None:
    documents = render(CHARTS["serving"], None, values)
    (service,) = [each for each in documents if name_of(each) == "Service/ictx-serving"]
    assert service["spec"].get("sessionAffinity") == affinity


@pytest.mark.parametrize(("secret", "scheme"), [("", "http"), ("tls", "https")])
def test_an_ingress_detects_the_protocol_of_mlflow(secret: str, scheme: str) -> None:
    """Traefik reads the port's name, gateways its appProtocol."""
    values = {"tls.existingSecret": secret, "ingress": INGRESS, "metrics.serviceMonitor.enabled": True}
    documents = render(CHARTS["mlflow"], None, values)
    (port,) = only(documents, "Service")["spec"]["ports"]
    assert (port["name"], port["appProtocol"], port["targetPort"]) == (scheme, scheme, "http")
    (path,) = only(documents, "Ingress")["spec"]["rules"][0]["http"]["paths"]
    (endpoint,) = only(documents, "ServiceMonitor")["spec"]["endpoints"]
    assert path["backend"]["service"]["port"]["name"] == endpoint["port"] == scheme


def test_keda_counts_the_requests_of_this_release_only() -> None:
    values = {"autoscaling": {"type": "keda", "prometheusUrl": "http://prometheus:9090"}}
    (trigger,) = only(render(CHARTS["serving"], None, values), "ScaledObject")["spec"]["triggers"]
    pattern = trigger["metadata"]["query"].split('pod=~"')[1].split('"')[0]
    assert re.fullmatch(pattern, "ictx-serving-6c8f9d7b54-x2x4z")
    for other in ("ictx-serving-canary-6c8f9d7b54-x2x4z", "ictx-serving-router-6c8f9d7b54-x2x4z"):
        assert not re.fullmatch(pattern, other)
    # Kubernetes shortens names of 58 characters, with a part of the ReplicaSet's hash.
    assert re.fullmatch(pattern.replace("ictx-serving", "a" * 52), "a" * 52 + "-6c8f9x2x4z")


@pytest.mark.parametrize(("address", "front"), [("0.0.0.0", "0.0.0.0"), ("::", "")])
def test_every_container_listens_on_the_address(address: str, front: str) -> None:
    values = {"listenAddress": address, "replicaCount": 2}
    assert option(server("serving", values).container("vllm"), "--host") == address
    router = next(pods([component(render(CHARTS["serving"], None, values), "Deployment", "router")]))
    assert option(router.container("router"), "--prometheus-host") == address
    # uvicorn's server of one process listens on IPv6 only with "::", and on both families without an address.
    assert option(router.container("front"), "--host") == front
    mlflow = server("mlflow", {"listenAddress": address, "metrics.annotations": True})
    assert option(mlflow.container("mlflow"), "--host") == address
    assert mlflow.container("metrics")["args"][-1] == address


def test_routers_have_labels_and_annotations_of_their_own() -> None:
    values = {"replicaCount": 2, "router": {"podLabels": {"tier": "gold"}, "podAnnotations": {"mesh/inject": "false"}}}
    documents = render(CHARTS["serving"], None, values)
    deployment = component(documents, "Deployment", "router")
    (router,) = pods([deployment])
    assert (router.labels["tier"], router.annotations["mesh/inject"]) == ("gold", "false")
    assert "tier" not in deployment["spec"]["selector"]["matchLabels"], "selectors are immutable"
    (other,) = pods([component(documents, "Deployment", "server")])
    assert ("tier" in other.labels, "mesh/inject" in other.annotations) == (False, False)


NGINX = "nginx.ingress.kubernetes.io"


def test_ingress_nginx_reaches_the_servers_and_passes_long_requests() -> None:
    """Its defaults are plain HTTP, 1 MiB for a request, and 60 seconds for a response."""

    def annotations(chart: str, values: Document, **ingress: Any) -> list[Document]:
        edge = {"enabled": True, "host": "a.example.org", "className": "nginx-internal", **ingress}
        documents = render(CHARTS[chart], None, {**values, "ingress": edge})
        return [each["metadata"].get("annotations", {}) for each in documents if each["kind"] == "Ingress"]

    values = {"router.requestTimeoutSeconds": 7200, "canary": {"service": "next", "weight": 10}}
    main, canary = annotations("serving", values, annotations={f"{NGINX}/proxy-body-size": "1g", "a/b": "c"})
    assert main == {
        f"{NGINX}/backend-protocol": "HTTPS",
        f"{NGINX}/proxy-body-size": "1g",
        f"{NGINX}/proxy-read-timeout": "7200",
        f"{NGINX}/proxy-send-timeout": "7200",
        "a/b": "c",
    }
    assert canary == {**main, f"{NGINX}/canary": "true", f"{NGINX}/canary-weight": "10"}
    (plain,) = annotations("serving", {"tls.enabled": False})
    assert f"{NGINX}/backend-protocol" not in plain
    (secure,) = annotations("mlflow", {"tls.existingSecret": "tls"})
    assert (secure[f"{NGINX}/backend-protocol"], secure[f"{NGINX}/proxy-body-size"]) == ("HTTPS", "0")
    for chart in CHARTS:
        assert annotations(chart, {}, className="traefik") == [{}]


@pytest.mark.parametrize(
    ("endpoint", "issuer", "ports"),
    [
        ("", "https://sso", ({443}, {443})),
        ("http://minio:9000", "https://sso:8443/x", ({443, 9000}, {443, 8443})),
        ("http://minio", "https://[fd00::1]/x", ({443, 80}, {443})),
    ],
)
def test_mlflow_reaches_the_store_and_the_provider_at_their_ports(
    endpoint: str, issuer: str, ports: tuple[set[int], set[int]]
) -> None:
    oidc = {"issuer": issuer, "clientId": "c", "existingSecret": "s", "url": "https://u"}
    store = {"type": "s3", "s3": {"uri": "s3://a", "endpointUrl": endpoint, "existingSecret": "s"}}
    documents = render(CHARTS["mlflow"], None, {"artifacts": store, "auth.oidc": oidc})
    policy = next(each for each in documents if name_of(each) == "NetworkPolicy/ictx-mlflow")
    _, s3, provider = policy["spec"]["egress"]
    assert ({each["port"] for each in s3["ports"]}, {each["port"] for each in provider["ports"]}) == ports


def test_a_gateway_reaches_mlflow_under_its_host_names() -> None:
    route = {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["m.example.org"], "caConfigMap": "ca"}
    documents = render(CHARTS["mlflow"], None, {"httpRoute": route, "tls.existingSecret": "tls"})
    spec = only(documents, "HTTPRoute")["spec"]
    assert spec["hostnames"] == ["m.example.org"]
    assert spec["rules"] == [{"backendRefs": [{"name": "ictx-mlflow", "port": 5000}], "timeouts": {"request": "0s"}}]
    policy = only(documents, "BackendTLSPolicy")["spec"]
    assert policy["targetRefs"] == [{"group": "", "kind": "Service", "name": "ictx-mlflow"}]
    assert policy["validation"]["hostname"] == "ictx-mlflow"
    (pod,) = pods([component(documents, "Deployment", "server")])
    container = pod.container("mlflow")
    assert {"m.example.org", "m.example.org:*"} <= set(option(container, "--allowed-hosts").split(","))
    assert "https://m.example.org" in option(container, "--cors-allowed-origins").split(",")


def test_servers_keep_idle_connections_longer_than_proxies() -> None:
    """Traefik reuses a connection for 90 seconds, ingress-nginx for 60; uvicorn alone closes it after 5."""
    vllm = server("serving", {}).container("vllm")
    assert {"name": "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "value": "120"} in vllm["env"]
    documents = render(CHARTS["serving"], None, {"replicaCount": 2})
    (router,) = pods([component(documents, "Deployment", "router")])
    assert option(router.container("front"), "--timeout-keep-alive") == "120"
    assert "--timeout-keep-alive=120" in option(server("mlflow", {}).container("mlflow"), "--uvicorn-opts").split()
