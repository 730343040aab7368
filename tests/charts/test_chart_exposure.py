"""How clients reach the charts' servers (Ingress, HTTPRoute, Services), and how the pods reach other systems."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest
from helm import CHARTS, Document, Pod, component, pods, render


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
