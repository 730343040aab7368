"""`ictx_serving_releases`: the objects that playbooks/serving.yml installs, and the values that preflight rejects."""

from __future__ import annotations

import json
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.template import Templar
from charts.test_serving_models import backends_of
from cluster import ROOT, Cluster, trusted
from helm import CHARTS, KUBERNETES, Document, component, helm, name_of, pods
from programs import loaded

SERVING = loaded(ROOT / "playbooks/plugins/filter/serving.py")
DIGEST, TRAINED = f"sha256:{'0' * 64}", f"sha256:{'1' * 64}"
RELEASES = [
    {"name": "large", "model": "ictx-large", "values": {"gpu": {"count": 4}, "service": {"port": 8443}}},
    {"name": "next", "version": 13, "weight": 10, "values": {"replicaCount": 2}},
    {"name": "lost", "model": "nowhere"},
    {"name": "old", "state": "absent"},
]


def templated(cluster: Cluster, variables: dict[str, Any], text: str) -> Any:
    """Returns the value of an expression of a playbook."""
    return Templar(cluster.loader, variables=variables).template(trusted(text))


def answer(version: int | None) -> dict[str, Any]:
    """Returns the registered result of a request to the registry."""
    if version is None:
        return {"status": 404, "json": {"error_code": "RESOURCE_DOES_NOT_EXIST"}}
    found = {"version": str(version), "tags": [{"key": "ictx.image_digest", "value": TRAINED}]}
    return {"status": 200, "json": {"model_version": found}}


class Site:
    """The example inventory with further releases, and the variables of the playbook when it calls helm."""

    def __init__(self, folder: Path, **extra: Any) -> None:
        for name, text in {
            "images/serving.json": json.dumps({"ref": f"r:5000/ictx/serving@{DIGEST}", "digest": DIGEST}),
            "secrets/mlflow_user_serving": "x",
            "secrets/serving_api_key": "x",
            "ca/ca.crt": "authority",
            **{f"ca/issued/serving{end}": end for end in (".crt", ".key", "-large.crt", "-next.crt", "-next.key")},
            "ca/issued/serving-large.key": "key",
        }.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        self.folder = folder
        self.cluster = Cluster(ROOT / "inventories/example", {"ictx_state_dir": str(folder), **extra})
        ((role, play, _),) = self.cluster.uses("playbooks/serving.yml")
        self.variables = self.cluster.variables("localhost", play, role) | {
            "_serving_found": answer(12),
            "_serving_further_found": {"results": [answer(3), answer(13), answer(None)] if extra else []},
        }

    def main(self) -> list[Document]:
        """Returns the objects of the main release, which has the address."""
        values = templated(self.cluster, self.variables, "{{ helm_release_values }}")
        return self.rendered("ictx", values)

    def rendered(self, name: str, values: Any) -> list[Document]:
        """Returns the objects of a release, as helm renders them."""
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(values))
        text = helm("template", name, str(CHARTS["serving"]), "--kube-version", KUBERNETES, "--values", str(file))
        return [document for document in yaml.safe_load_all(text) if document]

    def further(self) -> dict[str, dict[str, Any]]:
        """Returns the values of the further releases, by name."""
        (block,) = yaml.safe_load((ROOT / "playbooks/tasks/serving_release.yml").read_text())
        task = next(each for each in block["block"] if each["ansible.builtin.include_role"]["name"] == "helm_release")
        wanted = ("helm_release_values", "helm_release_secrets")
        found = {}
        for release in templated(self.cluster, self.variables, "{{ _serving_further_ready }}"):
            texts = {name: trusted(text) for name, text in block["vars"].items() if isinstance(text, str)}
            secret = {part: trusted(text) for part, text in block["vars"]["_serving_release_tls"]["data"].items()}
            name = trusted(block["vars"]["_serving_release_tls"]["name"])
            own = {"serving_release": release, "_serving_release_tls": {"name": name, "data": secret}}
            variables = {**self.variables, **texts, **own}
            found[release["name"]] = {name: templated(self.cluster, variables, task["vars"][name]) for name in wanted}
        return found


def test_helm_gets_further_releases_and_the_address_passes_requests_on(tmp_path: Path) -> None:
    site = Site(tmp_path, ictx_serving_releases=RELEASES)
    further = site.further()
    assert set(further) == {"large", "next"}, "releases without a version in the registry are skipped"
    assert backends_of(site.main()) == (
        "90", {"https://large-serving:8000": 100, "https://next-serving:8000": 10}
    )  # fmt: skip

    own = site.variables["ictx_serving_values"]
    large, canary = (further[name]["helm_release_values"] for name in ("large", "next"))
    assert large["model"] == {"name": "ictx-large", "alias": "champion", "version": "3", "trainingImageDigest": TRAINED}
    assert large["gpu"] == {"count": 4}
    assert large["service"] == {"type": "ClusterIP", "port": 8443}
    assert "runtimeClassName" not in large, "only a canary inherits the served model's values"
    assert canary["model"]["servedName"] == canary["model"]["name"] == own["model"]["name"]
    assert canary["model"]["version"] == "13"
    assert canary["vllm"] == own["vllm"]
    assert canary["service"] == {"type": "ClusterIP"}, "only the main release has the node port"
    for name, given in further.items():
        documents = site.rendered(name, given["helm_release_values"])
        pod = next(pods([component(documents, "Deployment", "server")]))
        assert pod.container("vllm")["image"] == f"r:5000/ictx/serving@{DIGEST}"
        assert f"Service/{name}-serving" in {name_of(each) for each in documents}
        policies = [each["spec"].get("ingress", []) for each in documents if each["kind"] == "NetworkPolicy"]
        assert SERVING.ROUTER in [peer for rules in policies for rule in rules for peer in rule["from"]]
        secrets = {secret["name"]: secret["data"] for secret in given["helm_release_secrets"]}
        assert secrets[f"{name}-serving-tls"]["tls.crt"] == f"-{name}.crt"
        assert given["helm_release_values"]["tls"]["existingSecret"] == f"{name}-serving-tls"
        assert {"ictx-serving-registry", "ictx-serving-clients"} <= set(secrets)


def test_without_further_releases_the_served_model_is_alone(tmp_path: Path) -> None:
    documents = Site(tmp_path).main()
    assert not [pod for pod in pods(documents) if "router" in pod.owner]


VERSIONS = {
    "/registered-models/alias?name=ictx-tiny&alias=champion": 12,
    "/registered-models/alias?name=ictx-large&alias=champion": 3,
    "/model-versions/get?name=ictx-tiny&version=13": 13,
}


class Registry(BaseHTTPRequestHandler):
    """Responds as MLflow's registry does."""

    def do_GET(self) -> None:
        """Sends the version of a model above, or an error."""
        found = answer(VERSIONS.get(self.path.partition("/api/2.0/mlflow")[2]))
        assert self.headers["Authorization"].startswith("Basic ")
        content = json.dumps(found["json"]).encode()
        self.send_response(found["status"])
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Suppresses the log of requests."""


def test_the_playbook_reports_which_version_each_release_serves(tmp_path: Path) -> None:
    """Runs until the certificate is issued, for which the test has no authority."""
    for name in ("ca", "secrets"):
        (tmp_path / name).mkdir()
    authority = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=a"]
    files = ["-keyout", tmp_path / "other.key", "-out", tmp_path / "ca/ca.crt"]
    subprocess.run([*authority, *files], check=True, capture_output=True)
    (tmp_path / "secrets/mlflow_admin_password").write_text("x")
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        variables = {
            "ictx_mlflow_uri": f"http://127.0.0.1:{server.server_address[1]}",
            "ictx_serving_releases": RELEASES,
            "ictx_state_dir": str(tmp_path),
            "lab_state_dir": str(tmp_path),
        }
        (tmp_path / "extra.json").write_text(json.dumps(variables))
        command = [
            "ansible-playbook",
            "-i",
            "inventories/lab",
            "playbooks/serving.yml",
            "-e",
            f"@{tmp_path}/extra.json",
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        server.shutdown()
    text = " ".join((done.stdout + done.stderr).split())
    for line in (
        "models:/ictx-tiny@champion is version 12",
        "release large: models:/ictx-large@champion is version 3",
        "release next: models:/ictx-tiny/13 is version 13",
        "release lost: models:/nowhere@champion does not exist: the release is skipped",
    ):
        assert line in text, text
    assert "release old" not in text
    assert "Issue the certificate" in text, text


@pytest.mark.parametrize(
    ("releases", "main", "problems"),
    [
        (RELEASES, {}, []),
        ([{"name": "Large_1", "model": "a"}], {}, ["Large_1: its name must be 1 to 44 lowercase letters"]),
        ([{"name": "1a", "model": "a"}], {}, ["1a: its name must be"]),
        ([{"name": "x" * 45, "model": "a"}], {}, [f"{'x' * 45}: its name must be"]),
        ([{"name": "ictx", "state": "absent"}], {}, ["ictx: is the name of the served model"]),
        ([{"name": "ictx-serving", "model": "a"}], {}, ["ictx-serving: is the name of the served model"]),
        ([{"name": "ictx-judge", "model": "a"}], {}, ["ictx-judge: is the name of the judge"]),
        (
            [{"name": "a", "model": "a"}, {"name": "a-serving", "model": "b"}],
            {},
            ["2 items have the Service a-serving: rename one"],
        ),
        ([{"name": "a"}], {}, ["a: needs model", "a: serves ictx-1b, like ictx"]),
        ([{"name": "a", "model": "m", "alias": "b", "version": 1}], {}, ["a: has both version and alias"]),
        ([{"name": "a", "model": "m", "values": {"model": {"name": "b"}}}], {}, ["a: values.model.name: set model of"]),
        ([{"name": "a", "model": "m", "values": {"fullnameOverride": "b"}}], {}, ["a: values.fullnameOverride: "]),
        ([{"name": "a", "weight": 101, "version": 2}], {}, ["a: weight is 101: must be from 0 to 100"]),
        ([{"name": "a", "weight": 5}], {}, ["a: has a weight, and serves what ictx serves (@champion)"]),
        ([{"name": "a", "weight": 5}], {"model": {"alias": "stable"}}, []),
        (
            [{"name": name, "weight": 60, "version": 2} for name in "ab"],
            {},
            ["a and b have a weight: requests are split between ictx and one canary"],
        ),
        (
            [{"name": "a", "weight": 5, "version": 2}],
            {"canary": {"service": "b"}},
            ["a has a weight, and ictx_serving_values has canary.service"],
        ),
        ([{"name": "a", "model": "m"}], {"router": {"enabled": False}}, ["needs the router, and router.enabled"]),
        (
            [{"name": "a", "model": "m"}, {"name": "b", "model": "n", "values": {"model": {"servedName": "m"}}}],
            {},
            ["b: serves m, like a: set values.model.servedName"],
        ),
        (
            [{"name": "a", "weight": 5, "version": 2, "values": {"model": {"servedName": "x"}}}],
            {},
            ["a: has a weight, and serves x instead of ictx-1b"],
        ),
    ],
)
def test_releases_that_make_no_sense_are_refused(releases: Any, main: Any, problems: list[str]) -> None:
    found = SERVING.release_problems(releases, main)
    assert len(found) == len(problems), found
    for line, start in zip(sorted(found), sorted(problems), strict=True):
        assert line.startswith(start), found


def test_what_the_playbook_installed_and_nobody_declares_is_found() -> None:
    listed = [
        {"name": name, "chart": f"{chart}+0123456789ab"}
        for name, chart in (("ictx", "serving-0.1.0"), ("ictx-judge", "serving-0.1.0"), ("ictx-mlflow", "mlflow-0.1.0"),
                            ("large", "serving-0.1.0"), ("old", "serving-0.1.0"), ("former", "serving-0.2.0-rc.1"))
    ]  # fmt: skip
    listed.append({"name": "somebodys", "chart": "serving-0.1.0"})
    assert SERVING.undeclared_releases(listed, RELEASES) == ["former"]
    assert SERVING.undeclared_releases(listed, []) == ["former", "large", "old"]
