"""Attacks of users on MLflow and on promoted versions, in the lab, with the users' own passwords."""

from __future__ import annotations

import base64
import json
import os
import re
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from lab import ROOT, STATE, Lab, wait_for

pytestmark = pytest.mark.lab

MODEL, ALIAS = "ictx-tiny", "champion"
PREFIXES = ["/api/2.0", "/ajax-api/2.0"]

IN_CLEAR = pytest.mark.attack(
    "H3",
    "an attacker listens on the network between a job and MLflow",
    before="names and passwords of users and the administrator were sent in clear text",
    now="TLS only, with a certificate of the platform's authority, which every client verifies",
)
MOVES = pytest.mark.attack(
    "H4",
    "a user moves the served alias, or changes its model, version or files",
    before="allowed for every user, and for the account with which the server downloads models",
    now="403 on every route: users can change only their own objects, promoters (ictx_promoters) promoted ones",
)
TWICE = pytest.mark.attack(
    "H4",
    "a request names the user's own run as `run_uuid`, and another's as `runId`, to tag, rename or delete it",
    before="MLflow 3.17.2 checks the first and changes the second: any user deleted any run, and so a model's files",
    now="403: a request must contain the ID once, as run_id, in a JSON object",
)
READS_ONLY = pytest.mark.attack(
    "H4",
    "the password of the serving pods is used to write",
    before="the account could move aliases and replace models",
    now="403: the account is read-only",
)
TAMPERS = pytest.mark.attack(
    "H4",
    "the writer of a promoted version replaces one of its files",
    before="the next pod served it, if the list of checksums was replaced too",
    now="the pull names the file and rejects the version, using the checksums recorded at its promotion",
)


@dataclass(frozen=True)
class Account:
    """A user of MLflow."""

    uri: str
    name: str
    password: str = field(repr=False)

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """Returns status and text of the response; a body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.uri + path, method=method, data=data)
        token = base64.b64encode(f"{self.name}:{self.password}".encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
        if not isinstance(body, bytes):
            request.add_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        trust = ssl.create_default_context(cafile=str(STATE / "ca/ca.crt"))
        try:
            with urllib.request.urlopen(request, timeout=60, context=trust) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def get(self, path: str) -> Any:
        """Returns the JSON of a response, whose status must be 200."""
        status, text = self.call("GET", f"/api/2.0/mlflow{path}")
        assert status == 200, text
        return json.loads(text)

    def bytes(self, path: str) -> bytes:
        """Returns the content of an artifact."""
        request = urllib.request.Request(f"{self.uri}/api/2.0/mlflow-artifacts/artifacts/{path}")
        token = base64.b64encode(f"{self.name}:{self.password}".encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
        trust = ssl.create_default_context(cafile=str(STATE / "ca/ca.crt"))
        with urllib.request.urlopen(request, timeout=60, context=trust) as answer:
            content: bytes = answer.read()
            return content


@dataclass(frozen=True)
class Target:
    """The served version."""

    version: str
    run: str
    experiment: str
    folder: str
    """Folder of its artifacts, below the server's root."""

    @classmethod
    def find(cls, admin: Account) -> Target:
        """Returns the served version, from the registry."""
        found = admin.get(f"/registered-models/alias?name={MODEL}&alias={ALIAS}")["model_version"]
        folder = found["source"].removeprefix("mlflow-artifacts:").strip("/")
        experiment = admin.get(f"/runs/get?run_id={found['run_id']}")["run"]["info"]["experiment_id"]
        return cls(str(found["version"]), found["run_id"], experiment, folder)


def of_person(lab: Lab, name: str) -> Account:
    """Returns the account that a user has on a compute node."""
    done = lab.run("n1", f"cat /etc/ictx/mlflow/{name}.env", user=name)
    assert done.returncode == 0, done.stderr
    values = dict(re.findall(r"^(\w+)=(.*)$", done.stdout, re.MULTILINE))
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    return Account(*(values[name] for name in names))


@pytest.fixture(scope="module")
def admin(lab: Lab) -> Account:
    values = lab.tracking()
    return Account(values["MLFLOW_TRACKING_URI"], "admin", values["MLFLOW_TRACKING_PASSWORD"])


@pytest.fixture(scope="module")
def mallory(lab: Lab) -> Account:
    return of_person(lab, "mallory")


@pytest.fixture(scope="module")
def researcher(lab: Lab) -> Account:
    """A promoter, who trained the served model."""
    return of_person(lab, "researcher")


@pytest.fixture(scope="module")
def serving(admin: Account) -> Account:
    """The account with which pods download models."""
    return Account(admin.uri, "serving", (STATE / "secrets/mlflow_user_serving").read_text().strip())


@pytest.fixture
def target(admin: Account) -> Iterator[Target]:
    """The served version, which must be unchanged after the test."""
    before = Target.find(admin)
    tags = admin.get(f"/model-versions/get?name={MODEL}&version={before.version}")["model_version"].get("tags")
    yield before
    assert Target.find(admin) == before
    after = admin.get(f"/model-versions/get?name={MODEL}&version={before.version}")["model_version"].get("tags")
    assert after == tags


def run_ictx(account: Account, *words: object) -> subprocess.CompletedProcess[str]:
    """Runs Python with the workload's package and the account's credentials."""
    environment = {
        "MLFLOW_TRACKING_URI": account.uri,
        "MLFLOW_TRACKING_USERNAME": account.name,
        "MLFLOW_TRACKING_PASSWORD": account.password,
        "MLFLOW_TRACKING_SERVER_CERT_PATH": str(STATE / "ca/ca.crt"),
        "PYTHONPATH": str(ROOT / "workload/src"),
    }
    command = [str(word) for word in (ROOT / ".venv-workload/bin/python", *words)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def changes(target: Target) -> list[tuple[str, str, Any]]:
    """Returns requests that change the model, its versions or the run: method, path, body."""
    version, run = {"name": MODEL, "version": target.version}, {"run_id": target.run}
    promoted = {"key": "ictx.promoted.sha256sums", "value": "x"}
    experiment = {"experiment_id": target.experiment}
    return [
        ("POST", "/registered-models/alias", {**version, "alias": ALIAS}),
        ("POST", "/registered-models/alias", {**version, "alias": "candidate"}),
        ("DELETE", "/registered-models/alias", {"name": MODEL, "alias": ALIAS}),
        ("POST", "/registered-models/rename", {"name": MODEL, "new_name": "mine"}),
        ("PATCH", "/registered-models/update", {"name": MODEL, "description": "x"}),
        ("DELETE", "/registered-models/delete", {"name": MODEL}),
        ("POST", "/registered-models/set-tag", {"name": MODEL, "key": "mlflow.prompt.is_prompt", "value": "true"}),
        ("DELETE", "/registered-models/delete-tag", {"name": MODEL, "key": "a"}),
        ("POST", "/model-versions/create", {"name": MODEL, "source": "mlflow-artifacts:/1/x/artifacts/model"}),
        ("PATCH", "/model-versions/update", {**version, "description": "x"}),
        (
            "POST",
            "/model-versions/transition-stage",
            {**version, "stage": "Archived", "archive_existing_versions": True},
        ),
        ("DELETE", "/model-versions/delete", version),
        ("POST", "/model-versions/set-tag", {**version, **promoted}),
        ("DELETE", "/model-versions/delete-tag", {**version, "key": promoted["key"]}),
        ("POST", "/runs/set-tag", {**run, "key": "ictx.image_digest", "value": "x"}),
        ("POST", "/runs/update", {**run, "status": "FAILED"}),
        ("POST", "/runs/delete", run),
        ("POST", "/runs/log-batch", {**run, "metrics": []}),
        ("POST", "/runs/create", experiment),
        ("POST", "/experiments/update", {**experiment, "new_name": "mine"}),
        ("POST", "/experiments/delete", experiment),
        ("POST", "/logged-models", {**experiment, "name": "x"}),
        ("POST", "/webhooks", {"name": "w", "url": "https://192.0.2.1", "events": []}),
        ("POST", "/users/create", {"username": "other", "password": "x" * 16}),
        ("PATCH", "/users/update-password", {"username": "researcher", "password": "x" * 16}),
        ("PATCH", "/users/update-admin", {"username": "mallory", "is_admin": True}),
    ]


def grants(name: str) -> list[tuple[str, Any]]:
    """Returns requests that grant a user permissions: path, body."""
    everything = {"resource_type": "registered_model", "resource_pattern": "*", "permission": "MANAGE"}
    mine = {"username": name, "resource_type": "registered_model", "resource_id": MODEL, "permission": "MANAGE"}
    return [
        ("/roles/create", {"name": "promoter", "workspace": "default"}),
        ("/roles/assign", {"role_id": 1, "username": name}),
        ("/roles/permissions/add", {"role_id": 1, **everything}),
        ("/users/permissions/grant", mine),
    ]


@IN_CLEAR
def test_mlflow_speaks_tls_of_the_platforms_authority_only(admin: Account) -> None:
    assert admin.uri.startswith("https://")
    with pytest.raises((ConnectionError, HTTPException, urllib.error.URLError)):
        urllib.request.urlopen(f"{admin.uri.replace('https', 'http')}/health", timeout=30)
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        urllib.request.urlopen(f"{admin.uri}/health", timeout=30, context=ssl.create_default_context())
    assert admin.call("GET", "/health")[0] == 200


@pytest.mark.attack(
    "L",
    "an unauthenticated client sends MLflow an endless request",
    before="the server buffered it before authentication, until it was killed",
    now="413 after 16 MiB (`server.maxBodyMiB`); artifacts are streamed after authentication",
)
def test_a_request_of_a_stranger_takes_no_more_than_its_share_of_memory(admin: Account) -> None:
    stranger = Account(admin.uri, "stranger", "wrong")
    for path in ("/api/2.0/mlflow/runs/create", "/graphql", "/nothing"):
        # The server may close the connection before the whole body was sent.
        try:
            status = stranger.call("POST", path, b"x" * (17 << 20))[0]
        except (ConnectionError, urllib.error.URLError):
            continue
        assert status == 413
    assert stranger.call("POST", "/api/2.0/mlflow/runs/create", b"x" * (1 << 20))[0] == 401
    assert admin.call("GET", "/health")[0] == 200


def test_users_read_what_others_made(mallory: Account, target: Target) -> None:
    assert mallory.get(f"/registered-models/alias?name={MODEL}&alias={ALIAS}")["model_version"]["run_id"] == target.run
    assert json.loads(mallory.bytes(f"{target.folder}/config.json"))["model_type"] == "deepseek_v3"


@MOVES
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_user_changes_nothing_of_what_another_registered(mallory: Account, target: Target, prefix: str) -> None:
    for method, path, body in changes(target):
        assert mallory.call(method, f"{prefix}/mlflow{path}", body)[0] == 403, (method, path)
    for path, body in grants("mallory"):
        assert mallory.call("POST", f"{prefix.replace('2.0', '3.0')}/mlflow{path}", body)[0] == 403, path


@MOVES
def test_no_other_way_of_writing_the_request_moves_the_alias(mallory: Account, target: Target) -> None:
    path, body = "/api/2.0/mlflow/registered-models/alias", {"name": MODEL, "alias": ALIAS, "version": target.version}
    text = {"Content-Type": "text/plain"}
    assert mallory.call("POST", f"{path}?alias=candidate", body)[0] == 403
    assert mallory.call("POST", path, body, {"X-HTTP-Method-Override": "GET"})[0] == 403
    for status, _ in (
        mallory.call("POST", path, json.dumps(body).encode(), text),
        mallory.call("POST", f"{path}/", body),
        mallory.call("POST", f"/{path}", body),
        mallory.call("PUT", path, body),
        mallory.call("POST", "/graphql", {"query": "mutation { setRegisteredModelAlias { alias } }"}),
    ):
        assert status in {200, 400, 403, 404, 405}
    # The fixture compares the version afterwards.


@MOVES
def test_what_is_checked_and_what_is_deleted_are_named_in_one_place(
    mallory: Account, researcher: Account, target: Target
) -> None:
    api = "/api/2.0/mlflow/registered-models"
    for account, name in ((mallory, "of-mallory"), (researcher, "of-researcher")):
        assert account.call("POST", f"{api}/create", {"name": name})[0] == 200
    try:
        # MLflow without the chart's middleware checks the name in the query, and deletes the one in the body.
        body = json.dumps({"name": "of-researcher"}).encode()
        for kind in ("text/plain", "application/x-www-form-urlencoded", "application/octet-stream"):
            headers = {"Content-Type": kind}
            assert mallory.call("DELETE", f"{api}/delete?name=of-mallory", body, headers)[0] == 403
            assert mallory.call("DELETE", f"{api}/alias?name=of-mallory&alias=candidate", body, headers)[0] == 403
        assert mallory.call("DELETE", f"{api}/delete", {"name": "of-researcher"})[0] == 403
    finally:
        for account, name in ((mallory, "of-mallory"), (researcher, "of-researcher")):
            assert account.call("DELETE", f"{api}/delete", {"name": name})[0] == 200


@TWICE
def test_a_request_that_names_two_runs_changes_neither(mallory: Account, admin: Account, target: Target) -> None:
    api = "/api/2.0/mlflow"
    _, text = mallory.call("POST", f"{api}/experiments/create", {"name": f"of-mallory-{time.time_ns()}"})
    experiment = json.loads(text)["experiment_id"]
    try:
        _, text = mallory.call("POST", f"{api}/runs/create", {"experiment_id": experiment})
        mine = json.loads(text)["run"]["info"]["run_id"]
        for name, values in {
            "set-tag": {"key": "ictx.git_commit", "value": "x"},
            "log-batch": {"tags": [{"key": "ictx.git_commit", "value": "x"}]},
            "log-parameter": {"key": "x", "value": "x"},
            "update": {"run_name": "of mallory"},
            "delete": {},
        }.items():
            body = {"run_uuid": mine, "runId": target.run, **values}
            assert mallory.call("POST", f"{api}/runs/{name}", body)[0] == 403, name
            assert mallory.call("POST", f"{api}/runs/{name}", {"run_id": mine, **values})[0] == 200, name
        run = admin.get(f"/runs/get?run_id={target.run}")["run"]
        assert run["info"]["lifecycle_stage"] == "active"
        assert run["info"]["run_name"] != "of mallory"
        assert {"key": "ictx.git_commit", "value": "x"} not in run["data"]["tags"]
        # If the body is not a JSON object, the names in the query are checked.
        query = f"/api/3.0/mlflow/datasets/create?experiment_ids={experiment}"
        inner = json.dumps({"name": "of-mallory", "experiment_ids": [target.experiment]})
        assert mallory.call("POST", query, inner.encode(), {"Content-Type": "text/plain"})[0] == 403
        assert mallory.call("POST", query, inner)[0] == 403
    finally:
        assert mallory.call("POST", f"{api}/experiments/delete", {"experiment_id": experiment})[0] == 200


@MOVES
def test_a_user_replaces_no_file_of_another(mallory: Account, target: Target) -> None:
    before = mallory.bytes(f"{target.folder}/config.json")
    first, rest = target.folder.split("/", 1)
    places = [target.folder, f"%3{first[0]}{first[1:]}/{rest}", f"./{target.folder}", f"9/../{target.folder}"]
    places += [f"9/%2e%2e/{target.folder}", f"%253{first[0]}{first[1:]}/{rest}", f"/{target.folder}"]
    for prefix in PREFIXES:
        for place in places:
            for method in ("PUT", "DELETE"):
                path = f"{prefix}/mlflow-artifacts/artifacts/{place}/config.json"
                assert mallory.call(method, path, b"{}")[0] != 200, (method, path)
        upload = {"path": f"{target.folder}/config.json", "num_parts": 1}
        assert mallory.call("POST", f"{prefix}/mlflow-artifacts/mpu/create/{target.folder}", upload)[0] == 403
    form = f"/ajax-api/2.0/mlflow/upload-artifact?run_uuid={target.run}&path=model/config.json"
    assert mallory.call("POST", form, b"{}")[0] == 403
    assert mallory.bytes(f"{target.folder}/config.json") == before


@MOVES
def test_a_user_promotes_not_even_his_own_model(mallory: Account, admin: Account, target: Target) -> None:
    api = "/api/2.0/mlflow"
    name, promoted = "of-mallory", {"key": "ictx.promoted.sha256sums", "value": "x"}
    assert mallory.call("POST", f"{api}/registered-models/create", {"name": name})[0] == 200
    try:
        version = {"name": name, "source": f"mlflow-artifacts:/{target.folder}", "run_id": target.run}
        assert mallory.call("POST", f"{api}/model-versions/create", {**version, "tags": [promoted]})[0] == 403
        for source in ("file:///etc", "https://192.0.2.1/model", "/data", "s3://bucket/model"):
            assert mallory.call("POST", f"{api}/model-versions/create", {"name": name, "source": source})[0] == 403
        assert mallory.call("POST", f"{api}/model-versions/create", version)[0] == 200
        this = {"name": name, "version": "1"}
        assert mallory.call("POST", f"{api}/registered-models/alias", {**this, "alias": "candidate"})[0] == 200
        for alias in (ALIAS, "Candidate", "candidate ", ""):
            status, text = mallory.call("POST", f"{api}/registered-models/alias", {**this, "alias": alias})
            assert status == 403
            assert "only promoters" in text
        assert mallory.call("POST", f"{api}/model-versions/set-tag", {**this, **promoted})[0] == 403
        assert mallory.call("POST", f"{api}/model-versions/transition-stage", {**this, "stage": "Production"})[0] == 403
        # Nor can mallory change or remove it after its promotion.
        assert admin.call("POST", f"{api}/registered-models/alias", {**this, "alias": ALIAS})[0] == 200
        assert mallory.call("DELETE", f"{api}/registered-models/alias", {"name": name, "alias": ALIAS})[0] == 403
        assert mallory.call("DELETE", f"{api}/model-versions/delete", this)[0] == 403
        assert mallory.call("DELETE", f"{api}/registered-models/delete", {"name": name})[0] == 403
        assert mallory.call("POST", f"{api}/registered-models/rename", {"name": name, "new_name": "x"})[0] == 403
        location = {"name": "of-mallory", "artifact_location": "file:///data"}
        assert mallory.call("POST", f"{api}/experiments/create", location)[0] == 403
    finally:
        assert admin.call("DELETE", f"{api}/registered-models/delete", {"name": name})[0] == 200


@MOVES
def test_the_command_line_promotes_for_promoters_only(lab: Lab, target: Target) -> None:
    forced = "--force --reason 'end-to-end tests'"
    command = f"/opt/ictx/bin/ictx promote {target.version} --alias {ALIAS} --model {MODEL} {forced}"
    assert lab.run("ctl", command.replace(ALIAS, "stable"), user="bob").returncode == 2
    done = lab.run("ctl", command, user="researcher")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"models:/{MODEL}@{ALIAS} is version {target.version}" in done.stdout


TRACKER = """
import pathlib, sys
from ictx.track.mlflow import Tracker
folder = pathlib.Path(sys.argv[1])
(folder / "export").mkdir()
(folder / "export" / "config.json").write_text("{}")
tracker = Tracker(folder, "pretrain", {}, patience=0)
version = tracker.register(folder / "export", sys.argv[2], "candidate")
tracker.finish("FINISHED")
print(tracker.experiment, tracker.model, version)
"""


def test_a_job_with_the_names_of_another_user_loses_nothing(
    lab: Lab, admin: Account, target: Target, tmp_path: Path
) -> None:
    candidate = admin.get(f"/registered-models/alias?name={MODEL}&alias=candidate")
    bob = of_person(lab, "bob")
    before = {model["name"] for model in admin.get("/registered-models/search").get("registered_models", [])}
    done = run_ictx(bob, "-c", TRACKER, tmp_path, MODEL)
    assert done.returncode == 0, done.stderr
    experiment, model, version = done.stdout.splitlines()[-1].split()
    assert experiment == "pretrain-bob"
    assert model == f"{MODEL}-bob"
    assert admin.get(f"/registered-models/alias?name={model}&alias=candidate")["model_version"]["version"] == version
    assert admin.get(f"/registered-models/alias?name={MODEL}&alias=candidate") == candidate
    what = ("registered-models", {"name": model}) if model not in before else (
        "model-versions", {"name": model, "version": version})  # fmt: skip
    assert bob.call("DELETE", f"/api/2.0/mlflow/{what[0]}/delete", what[1])[0] == 200


@READS_ONLY
def test_the_account_of_the_serving_pods_only_reads(serving: Account, target: Target) -> None:
    assert json.loads(serving.bytes(f"{target.folder}/config.json"))["model_type"] == "deepseek_v3"
    api = "/api/2.0/mlflow"
    more = [
        ("POST", "/experiments/create", {"name": "of-serving"}),
        ("POST", "/registered-models/create", {"name": "of-serving"}),
    ]
    for method, path, body in changes(target) + more:
        assert serving.call(method, f"{api}{path}", body)[0] == 403, (method, path)
    artifact = f"/api/2.0/mlflow-artifacts/artifacts/{target.folder}/config.json"
    assert serving.call("PUT", artifact, b"{}")[0] == 403
    assert serving.call("POST", "/graphql", {"query": "{ __typename }"})[0] == 403


@TAMPERS
def test_a_file_that_changed_after_the_promotion_is_refused_by_name(
    researcher: Account, serving: Account, target: Target, tmp_path: Path
) -> None:
    place = f"{target.folder}/generation_config.json"
    artifact, before = f"/api/2.0/mlflow-artifacts/artifacts/{place}", researcher.bytes(place)

    def pull(folder: str) -> subprocess.CompletedProcess[str]:
        uri = f"models:/{MODEL}/{target.version}"
        return run_ictx(serving, "-m", "ictx", "pull", uri, "--promoted", "--to", tmp_path / folder)

    try:
        # The version's owner can write its files; an additional space does not change the JSON's meaning.
        assert researcher.call("PUT", artifact, before + b" ")[0] == 200
        done = pull("changed")
        assert done.returncode == 2, done.stdout
        assert "generation_config.json of version" in done.stderr
        assert "does not have the checksum that its promotion recorded" in done.stderr
        assert "promote another version" in done.stderr
        assert not (tmp_path / "changed").exists()
    finally:
        assert researcher.call("PUT", artifact, before)[0] == 200
    done = pull("intact")
    assert done.returncode == 0, done.stderr


@pytest.mark.full
@pytest.mark.attack(
    "M8",
    "the administrator's password leaked and is replaced on the control host",
    before="playbooks/mlflow.yml failed without a reason",
    now="applied without a restart; both are accepted until the rotation is finished, then the old one is rejected",
)
def test_a_new_password_of_the_administrator_is_taken_and_no_request_lost(admin: Account, mallory: Account) -> None:
    file = STATE / "secrets/mlflow_admin_password"
    previous, done, failures, answered = file.with_name(f"{file.name}.previous"), threading.Event(), [], []
    old, new = file.read_text(), f"{os.urandom(12).hex()}x"

    def converge() -> None:
        command = [ROOT / ".venv/bin/ansible-playbook", "playbooks/mlflow.yml"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout[-3000:]

    def client(account: Account) -> None:
        while not done.is_set():
            status, text = account.call("GET", "/api/2.0/mlflow/experiments/search?max_results=1")
            (answered if status == 200 else failures).append(text)
            done.wait(0.2)

    threads = [threading.Thread(target=client, args=(account,)) for account in (admin, mallory)]
    for thread in threads:
        thread.start()
    try:
        previous.write_text(old)
        file.write_text(f"{new}\n")
        converge()
        assert Account(admin.uri, "admin", new).call("GET", "/api/2.0/mlflow/users/list")[0] == 200
        count = len(answered)
        wait_for("answers after the change", lambda: len(answered) > count + 5)
    except BaseException:
        if Account(admin.uri, "admin", new).call("GET", "/api/2.0/mlflow/users/list")[0] != 200:
            file.write_text(old)
            previous.unlink()
        raise
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert failures == []
    previous.unlink()
    converge()
    wait_for("the end of the old password", lambda: admin.call("GET", "/api/2.0/mlflow/users/list")[0] == 401)
