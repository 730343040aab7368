"""`ictx_mlflow_oidc`: the objects that playbooks/mlflow.yml installs with helm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from cluster import ROOT, Cluster
from helm import CHARTS, KUBERNETES, component, helm, name_of, pods
from templates.test_further_releases import DIGEST, templated

FILES = {
    "images/mlflow.json": json.dumps({"ref": f"r:5000/ictx/mlflow@{DIGEST}", "digest": DIGEST}),
    "ca/ca.crt": "authority",
    "ca/issued/mlflow.crt": "crt",
    "ca/issued/mlflow.key": "key",
    "client-secret": "of-the-client\n",
    "provider.crt": "of-the-provider",
}


def given(folder: Path, **extra: Any) -> tuple[Any, Any]:
    """Returns the Secrets and the chart values for the example inventory."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    cluster = Cluster(ROOT / "inventories/example", {"ictx_state_dir": str(folder), **extra})
    role, play, _ = next(use for use in cluster.uses("playbooks/mlflow.yml") if use[0].get_name() == "helm_release")
    variables = cluster.variables("localhost", play, role)
    secrets, values = (
        templated(cluster, variables, f"{{{{ helm_release_{name} }}}}") for name in ("secrets", "values")
    )
    return {secret["name"]: secret["data"] for secret in secrets}, values


def test_people_sign_in_at_the_provider_of_the_inventory(tmp_path: Path) -> None:
    oidc = {"issuer": "https://sso.example.org:8443/x", "client_id": "mlflow", "username_claim": "uid"}
    oidc |= {"client_secret_file": str(tmp_path / "client-secret"), "ca_file": str(tmp_path / "provider.crt")}
    secrets, values = given(tmp_path, ictx_mlflow_oidc={**oidc, "url": "https://mlflow.example.org"})
    assert secrets["ictx-mlflow-oidc"] == {"client-secret": "of-the-client", "ca.crt": "of-the-provider"}
    (tmp_path / "values.json").write_text(json.dumps(values))
    made = helm("template", "ictx-mlflow", str(CHARTS["mlflow"]), "--kube-version", KUBERNETES, "--values",
                str(tmp_path / "values.json"))  # fmt: skip
    documents = [each for each in yaml.safe_load_all(made) if each]
    pod = next(pods([component(documents, "Deployment", "server")]))
    env = {each["name"]: each.get("value") or each["valueFrom"] for each in pod.container("mlflow")["env"]}
    assert env["OIDC_ISSUER"] == oidc["issuer"]
    assert env["OIDC_USERNAME_CLAIM"] == "uid"
    assert env["OIDC_CLIENT_SECRET"] == {"secretKeyRef": {"name": "ictx-mlflow-oidc", "key": "client-secret"}}
    assert env["OIDC_CA_FILE"] == "/etc/mlflow-provider/ca.crt"
    assert "ictx/oidc-secret" in pod.annotations
    assert "ictx/session-key" in pod.annotations
    words = pod.container("mlflow")["args"]
    assert "mlflow.example.org" in words[words.index("--allowed-hosts") + 1].split(",")
    (policy,) = (each for each in documents if name_of(each) == "NetworkPolicy/ictx-mlflow")
    assert {"ports": [{"port": 8443, "protocol": "TCP"}]} in policy["spec"]["egress"]


def test_by_default_there_are_passwords_only(tmp_path: Path) -> None:
    secrets, values = given(tmp_path)
    assert "ictx-mlflow-oidc" not in secrets
    assert "oidc" not in values["auth"]


def test_browsers_use_the_address_of_the_inventory(tmp_path: Path) -> None:
    _, values = given(tmp_path, ictx_mlflow_uri="https://node1.example.org:31500/")
    assert values["server"]["corsAllowedOrigins"] == ["https://node1.example.org:31500"]
