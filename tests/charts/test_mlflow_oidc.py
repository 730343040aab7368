"""Sign-in at an OpenID provider: MLflow's server with the chart's programs, and a test provider."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT
from helm import CHARTS, component, pods, render
from kubernetes_api import free_port
from programs import CACHE

pytestmark = pytest.mark.full

UV = [str(Path(sys.executable).parent / "uv"), "run", "--quiet", "--no-project", "--python", sys.executable]
SERVER = [*UV, "--with-requirements", str(ROOT / "workload/requirements/mlflow.txt")]
PROVIDER = [*UV, "--with", "oidc-provider-mock==0.3.4", "oidc-provider-mock"]
SECRETS = {"admin-username": "admin", "admin-password": "a-long-password", "flask-secret-key": "k" * 32}
SECRETS |= {"client-secret": "of-the-client"}
PEOPLE = ("alice", "mallory", "admin")
API = "/api/2.0/mlflow"


class Browser:
    """A client that follows redirects and keeps cookies; with a password, a program's client."""

    def __init__(self, url: str, password: str = "") -> None:
        self.url, self.cookies = url, CookieJar()
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self.cookies))
        self.headers = {"Accept": "application/json"}
        if password:
            self.headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, str, str]:
        """Sends a request; returns status, text and the final URL."""
        data = json.dumps(body).encode() if body is not None else None
        kind = {"Content-Type": "application/json"} if body is not None else {}
        return self.open(urllib.request.Request(self.url + path, data, {**self.headers, **kind, **headers}))

    def open(self, request: urllib.request.Request) -> tuple[int, str, str]:
        """Sends a request; returns status, text and the final URL."""
        try:
            with self.opener.open(request, timeout=60) as answer:
                return answer.status, answer.read().decode(), answer.url
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), error.url

    def page(self, path: str = "/") -> tuple[int, str, str]:
        """Opens a page, as a browser does."""
        return self.ask(path, Accept="text/html,*/*")

    def sign_in(self, name: str, path: str = "/") -> tuple[int, str, str]:
        """Opens a page, and signs in at the provider to which it redirects."""
        status, text, form = self.page(path)
        assert status == 200, text
        data = urllib.parse.urlencode({"sub": name}).encode()
        return self.open(urllib.request.Request(form, data, {"Accept": "text/html"}))


@contextlib.contextmanager
def running(folder: Path, name: str, command: list[str], url: str, **environment: str) -> Iterator[None]:
    """Runs a server until the block ends."""
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment}, cwd=folder)
    try:
        end = time.monotonic() + 600
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
                break
            assert process.poll() is None, (folder / f"{name}.log").read_text()[-3000:]
            assert time.monotonic() < end, (folder / f"{name}.log").read_text()[-3000:]
            time.sleep(1)
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def issuer() -> str:
    """The provider's URL; the fixture `provider` starts the provider."""
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory, issuer: str) -> Iterator[str]:
    """Runs the server as the chart does, with an account for alice; yields its URL."""
    folder, port = tmp_path_factory.mktemp("oidc"), free_port()
    url = f"http://127.0.0.1:{port}"
    documents = render(CHARTS["mlflow"], CHARTS["mlflow"] / "ci/oidc.yaml", {"server.workers": 1})
    pod = next(pods([component(documents, "Deployment", "server")]))
    places = {"/data": folder, "/run/mlflow": folder, "/etc/mlflow-guard": folder / "guard"}
    data = next(each["data"] for each in documents if each["metadata"]["name"].endswith("-guard"))
    (volume,) = (each for each in pod.spec["volumes"] if each["name"] == "guard")
    for item in volume["configMap"]["items"]:
        file = folder / "guard" / item["path"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(data[item["key"]])

    def here(text: str) -> str:
        for place, folder in places.items():
            text = text.replace(place, str(folder))
        return {"0.0.0.0": "127.0.0.1", "5000": str(port)}.get(text, text)

    def environment(name: str) -> dict[str, str]:
        env = pod.container(name)["env"]
        found = {
            each["name"]: here(each["value"]) if "value" in each else SECRETS[each["valueFrom"]["secretKeyRef"]["key"]]
            for each in env
        }
        found.pop("OIDC_CA_FILE", None)
        return {**found, "OIDC_ISSUER": issuer, "OIDC_URL": url, "UV_CACHE_DIR": str(CACHE / "uv")}

    prepare = pod.container("prepare")
    subprocess.run(
        [*SERVER, *prepare["command"], *prepare["args"]],
        check=True, cwd=folder, env={**os.environ, **environment("prepare")},
    )  # fmt: skip
    server = pod.container("mlflow")
    command = [*SERVER, *server["command"], *(here(word) for word in server["args"])]
    with running(folder, "mlflow", command, f"{url}/health", **environment("mlflow")):
        admin = Browser(url, f"admin:{SECRETS['admin-password']}")
        account = {"username": "alice", "password": "password-of-alice"}
        assert admin.ask(f"{API}/users/create", account)[0] == 200
        yield url


@pytest.fixture(scope="module")
def provider(mlflow: str, issuer: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Runs the provider, with three users; yields its URL."""
    status, text, _ = Browser(mlflow).page()
    assert (status, text) == (502, f"the identity provider {issuer} does not respond: ConnectionError\n")
    known = [json.dumps({"sub": name, "preferred_username": name}) for name in PEOPLE]
    words = [word for claims in known for word in ("--user-claims", claims)]
    command = [*PROVIDER, "--require-nonce", "true", "--port", issuer.rpartition(":")[2], *words]
    folder = tmp_path_factory.mktemp("provider")
    with running(folder, "provider", command, f"{issuer}/.well-known/openid-configuration"):
        yield issuer


def test_who_signs_in_has_the_account_of_that_name(mlflow: str, provider: str) -> None:
    browser = Browser(mlflow)
    assert browser.ask(f"{API}/users/current")[0] == 401, "programs are not redirected"
    form = urllib.parse.urlsplit(browser.page()[2])
    asked = urllib.parse.parse_qs(form.query)
    assert f"{form.scheme}://{form.netloc}" == provider
    assert asked["redirect_uri"] == [f"{mlflow}/oidc/callback"]
    assert asked["code_challenge_method"] == ["S256"]
    status, text, url = browser.sign_in("alice", "/?page=1")
    assert (status, url) == (200, f"{mlflow}/?page=1"), text
    assert json.loads(browser.ask(f"{API}/users/current")[1])["user"]["username"] == "alice"
    assert browser.ask(f"{API}/experiments/create", {"name": "of-alice"})[0] == 200
    assert browser.ask(f"{API}/registered-models/create", {"name": "model"})[0] == 200
    alias = {"name": "model", "alias": "champion", "version": "1"}
    status, text, _ = browser.ask(f"{API}/registered-models/alias", alias)
    assert (status, "only promoters" in text) == (403, True), text
    (cookie,) = (each for each in browser.cookies if each.name == "ictx_mlflow")
    assert cookie.has_nonstandard_attr("HttpOnly")
    assert cookie.get_nonstandard_attr("SameSite") == "Lax"
    assert browser.ask("/oidc/logout")[0] == 200
    assert browser.ask(f"{API}/users/current")[0] == 401


@pytest.mark.parametrize(
    ("name", "reason"),
    [("mallory", "mallory has no account in MLflow"), ("admin", "admin is an administrator of MLflow")],
)
def test_who_has_no_account_or_is_an_administrator_is_refused(
    mlflow: str, provider: str, name: str, reason: str
) -> None:
    browser = Browser(mlflow)
    status, text, _ = browser.sign_in(name)
    assert (status, reason in text) == (403, True), text
    assert browser.ask(f"{API}/users/current")[0] == 401


def test_an_answer_that_nobody_asked_for_and_a_forged_cookie_are_refused(mlflow: str, provider: str) -> None:
    browser = Browser(mlflow)
    assert browser.page("/oidc/callback?code=x&state=y")[0] == 401
    forged = base64.urlsafe_b64encode(json.dumps({"ictx_user": ["alice", 9e9]}).encode()).decode()
    assert browser.ask(f"{API}/users/current", Cookie=f"ictx_mlflow={forged}.aa.aa")[0] == 401
    status, _, url = browser.sign_in("alice", "/oidc/login?next=//evil.example.org/")
    assert (status, url) == (200, f"{mlflow}/"), "redirects to this server only"


def test_programs_keep_their_passwords_and_a_deleted_account_its_session_not(mlflow: str, provider: str) -> None:
    browser = Browser(mlflow)
    browser.sign_in("alice")
    program = Browser(mlflow, "alice:password-of-alice")
    assert program.ask(f"{API}/users/current")[0] == 200
    assert Browser(mlflow, "alice:wrong").ask(f"{API}/users/current")[0] == 401
    assert browser.ask(f"{API}/users/current")[0] == 200
    admin = Browser(mlflow, f"admin:{SECRETS['admin-password']}")
    request = urllib.request.Request(
        f"{mlflow}{API}/users/delete", b'{"username": "alice"}',
        {**admin.headers, "Content-Type": "application/json"}, method="DELETE",
    )  # fmt: skip
    assert admin.open(request)[0] == 200
    assert browser.ask(f"{API}/users/current")[0] == 401
