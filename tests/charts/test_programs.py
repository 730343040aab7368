"""The programs in the charts' pods, run as the pods run them: drain, test, auth settings, backup and restore."""

from __future__ import annotations

import asyncio
import configparser
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helm import CHARTS, only, pods, render


def program(chart: str, name: str) -> str:
    return (CHARTS[chart] / "files" / f"{name}.py").read_text()


def run(text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", text, *arguments]
    return subprocess.run(
        command,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@contextmanager
def serve(answer: Callable[[BaseHTTPRequestHandler, Any], tuple[int, str]]) -> Iterator[int]:
    """Serves the result of a function of handler and body on a free port; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # a response is one packet

        def do_GET(self) -> None:
            size = int(self.headers.get("Content-Length", 0))
            status, text = answer(self, json.loads(self.rfile.read(size)) if size else None)
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = do_TRACE = do_PROPFIND = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_pods_run_the_programs_unchanged() -> None:
    documents = render(CHARTS["mlflow"], None, {"backup.enabled": True, "gc.enabled": True})
    texts = {pod.owner: pod.containers[0]["command"][-1] for pod in pods(documents)}
    assert texts["CronJob/ictx-mlflow-backup"].strip() == program("mlflow", "snapshots").strip()
    assert texts["CronJob/ictx-mlflow-gc"].strip() == program("mlflow", "gc").strip()
    assert texts["Deployment/ictx-mlflow"].strip() == program("mlflow", "prepare").strip()
    guard = only(documents, "ConfigMap")["data"]
    for name in ("ictx_guard", "ictx_bounded"):
        assert guard[f"{name}.py"].strip() == program("mlflow", name).strip()
    assert "ictx_oidc.py" not in guard, "no sign-in at a provider unless it is configured"
    mine = only(render(CHARTS["mlflow"], CHARTS["mlflow"] / "ci/oidc.yaml"), "ConfigMap")["data"]
    assert mine["ictx_oidc.py"].strip() == program("mlflow", "ictx_oidc").strip()
    assert guard["entry_points.txt"].splitlines() == ["[mlflow.app]", "basic-auth = ictx_bounded:create_app"]
    pod = only(render(CHARTS["mlflow"], None, {"metrics.annotations": True}), "Deployment")["spec"]["template"]
    (metrics,) = (each for each in pod["spec"]["containers"] if each["name"] == "metrics")
    assert metrics["command"][-1].strip() == program("mlflow", "metrics").strip()
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == metrics["args"][1] == "9100"
    deployment = only(render(CHARTS["serving"]), "Deployment")["spec"]["template"]["spec"]
    pre_stop = deployment["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert pre_stop[2].strip() == program("serving", "drain").strip()


# vllm:num_requests_waiting_by_reason counts the same requests a second time.
METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{{engine="0",model_name="m"}} {running}.0
vllm:num_requests_waiting{{engine="0",model_name="m"}} {waiting}.0
vllm:num_requests_waiting_by_reason{{engine="0",model_name="m",reason="capacity"}} 7.0
"""


def drain(port: int, delay: str, timeout: str, **environment: str) -> tuple[int, float]:
    start = time.monotonic()
    container, *_ = only(render(CHARTS["serving"]), "Deployment")["spec"]["template"]["spec"]["containers"]
    hook = container["lifecycle"]["preStop"]["exec"]["command"][5:]
    arguments = [word.replace("127.0.0.1:9100", f"127.0.0.1:{port}") for word in hook]
    done = run(program("serving", "drain"), delay, timeout, *arguments, **environment)
    assert done.stderr == ""
    return done.returncode, time.monotonic() - start


def test_drain_waits_for_the_requests_in_flight() -> None:
    left = [(2, 1), (1, 0), (0, 1), (0, 0)]
    asked: list[float] = []

    def answer(handler: BaseHTTPRequestHandler, _: Any) -> tuple[int, str]:
        asked.append(time.monotonic())
        running, waiting = left[min(len(asked), len(left)) - 1]
        return 200, METRICS.format(running=running, waiting=waiting)

    with serve(answer) as port:
        start = time.monotonic()
        status, _ = drain(port, "1", "60")
    assert status == 0
    assert len(asked) == 4
    assert asked[0] - start >= 1


def test_drain_ends_when_its_time_is_up_or_the_server_is_gone() -> None:
    with serve(lambda *_: (200, METRICS.format(running=1, waiting=0))) as port:
        status, seconds = drain(port, "0", "2")
    assert status == 0
    assert 2 <= seconds < 10
    status, seconds = drain(port, "0", "60")
    assert status == 0
    assert seconds < 10


def test_drain_reaches_its_own_server_past_a_proxy() -> None:
    """A site that sets HTTP_PROXY for downloads (vllm.extraEnv) would otherwise end requests at once."""
    with serve(lambda *_: (200, METRICS.format(running=1, waiting=0))) as port:
        _, seconds = drain(port, "0", "2", http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9")
    assert seconds >= 2


def endpoint(
    refuse: bool = True, model: str = "m", stream: bool = True, opened: str = "", listed: str = "/v1/completions"
) -> Callable[..., tuple[int, str]]:
    """Responds as vLLM behind the gate does, with the given faults; `opened` is a method and path without a key."""

    def answer(handler: BaseHTTPRequestHandler, body: Any) -> tuple[int, str]:
        target = handler.requestline.split()[1]  # handler.path merges two slashes
        asked, path = f"{handler.command} {target}", target.partition("?")[0]
        known = handler.headers.get("Authorization") == "Bearer right"
        if (refuse and not known and asked not in ("GET /health", opened)) or opened == f"not {asked}":
            return 401, '{"error": "Unauthorized"}'
        if path == "/openapi.json":
            return 200, json.dumps({"paths": {listed: {}, "/health": {}, "/v1/responses/{response_id}": {}}})
        if (body or {}).get("stream"):
            return 200, "data: {}\n\ndata: {}\n\ndata: [DONE]\n\n" if stream else "data: [DONE]\n\n"
        return 200, json.dumps({"model": model, "usage": {"completion_tokens": 8}, "choices": [{"text": " a"}]})

    return answer


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (endpoint(), ""),
        (endpoint(refuse=False), "without a key: 401"),
        (endpoint(model="other"), "the response names the model"),
        (endpoint(stream=False), "a stream has several events and ends"),
        (lambda *_: (503, "loading"), "without a key: 401"),
    ],
)
def test_the_test_of_serving_finds_what_is_wrong(answer: Callable[..., tuple[int, str]], wrong: str) -> None:
    with serve(answer) as port:
        url = f"http://127.0.0.1:{port}"
        done = run(program("serving", "ask"), URL=url, MODEL="m", KEY="right", TIMEOUT="10")
    assert (done.returncode == 0) == (not wrong), done.stdout + done.stderr
    assert f"FAILED: {wrong}" in done.stdout if wrong else 'completion: " a"' in done.stdout


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (endpoint(), ""),
        (endpoint(opened="POST /invocations"), "FAILED: POST /invocations with no key: 200"),
        (endpoint(opened="GET /metrics"), "FAILED: GET /metrics with no key: 200"),
        # A path that only the server lists, such as one of a new version.
        (endpoint(opened="DELETE /v1/responses/response_id"), "FAILED: DELETE /v1/responses/response_id with no key"),
        (endpoint(opened="OPTIONS /v1/completions"), "FAILED: OPTIONS /v1/completions with no key: 200"),
        (endpoint(opened="HEAD /health"), "FAILED: HEAD /health with no key: 200"),
        (
            endpoint(opened="POST /load?api_key=right"),
            "FAILED: POST /load?api_key=right with the key in the query: 200",
        ),
        (endpoint(opened="not GET /health"), "GET /health: 401"),
        (endpoint(listed="/other"), "/openapi.json does not list vLLM's paths"),
        (lambda *_: (401, "no"), "GET /openapi.json with the key: 401"),
    ],
)
def test_the_walk_finds_every_path_that_is_open(answer: Callable[..., tuple[int, str]], wrong: str) -> None:
    with serve(answer) as port:
        done = run(program("serving", "walk"), URL=f"http://127.0.0.1:{port}", KEY="right", TIMEOUT="10")
    assert (done.returncode == 0) == (not wrong), done.stdout + done.stderr
    assert wrong in done.stdout + done.stderr
    assert wrong or "GET /health: 200" in done.stdout


@pytest.mark.parametrize(("open_to_all", "status"), [(False, 0), (True, 1)])
def test_the_test_of_mlflow_finds_an_open_server(open_to_all: bool, status: int) -> None:
    def answer(handler: BaseHTTPRequestHandler, _: Any) -> tuple[int, str]:
        # admin:right
        known = handler.headers.get("Authorization") == "Basic YWRtaW46cmlnaHQ="
        return (200, "{}") if known or open_to_all or handler.path == "/health" else (401, "no")

    with serve(answer) as port:
        url = f"http://127.0.0.1:{port}"
        credentials = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "right"}
        done = run(program("mlflow", "ask"), MLFLOW_TRACKING_URI=url, **credentials)
    assert done.returncode == status, done.stdout + done.stderr


def test_auth_settings_are_private_and_survive_odd_passwords(tmp_path: Path) -> None:
    file, uri = tmp_path / "basic_auth.ini", "postgresql://u:p%2Fw%25@h/d"
    file.write_text("old")
    environment = {"MLFLOW_AUTH_CONFIG_PATH": str(file), "AUTH_DATABASE_URI": uri}
    environment |= {"AUTH_DEFAULT_PERMISSION": "READ", "AUTH_CACHE_SECONDS": "60"}
    done = run(program("mlflow", "prepare"), "auth-config", **environment)
    assert done.returncode == 0, done.stderr
    assert "p%2Fw" not in done.stdout
    # Parsed as MLflow does.
    config = configparser.ConfigParser()
    config.read(file)
    assert config["mlflow"]["database_uri"] == uri
    assert config["mlflow"]["default_permission"] == "READ"
    fresh = tmp_path / "fresh.ini"
    run(program("mlflow", "prepare"), "auth-config", **{**environment, "MLFLOW_AUTH_CONFIG_PATH": str(fresh)})
    assert fresh.stat().st_mode & 0o777 == 0o600


def answer_of(sent: list[int], path: str = "/api/2.0/mlflow/runs/create", method: str = "POST") -> tuple[int, int]:
    """Returns the status for a body in pieces of these sizes, and the number of bytes that reach the app."""
    module: dict[str, Any] = {"__name__": "ictx_bounded"}
    exec(program("mlflow", "ictx_bounded"), module)
    taken, answered = 0, []
    pieces = [{"type": "http.request", "body": b"x" * size, "more_body": True} for size in sent]
    pieces += [{"type": "http.request", "body": b""}]

    async def app(_: Any, receive: Any, send: Any) -> None:
        nonlocal taken
        try:
            while True:
                message = await receive()
                taken += len(message["body"])
                if not message.get("more_body"):
                    break
        finally:  # as Starlette sends 500
            await send({"type": "http.response.start", "status": 200})

    async def receive() -> Any:
        return pieces.pop(0)

    async def send(message: Any) -> None:
        answered.extend([message["status"]] if "status" in message else [])

    bounded = module["Bounded"](app, 100)
    asyncio.run(bounded({"type": "http", "method": method, "path": path}, receive, send))
    (status,) = answered
    return status, taken


def test_only_artifacts_are_larger_than_a_body_may_be() -> None:
    assert answer_of([60, 40]) == (200, 100)
    assert answer_of([60, 41, 60]) == (413, 60)
    assert answer_of([101]) == (413, 0)
    artifact = "/api/2.0/mlflow-artifacts/artifacts/1/x"
    assert answer_of([1000], artifact, "PUT") == (200, 1000)
    assert answer_of([1000], f"/ajax{artifact}".replace("/ajax/", "/ajax-"), "PUT") == (200, 1000)
    assert answer_of([1000], artifact) == (413, 0)
    assert answer_of([1000], f"/x{artifact}", "PUT") == (413, 0)


class Site:
    """The volumes of a server: databases, artifacts, backups."""

    def __init__(self, folder: Path) -> None:
        self.data, self.backups = folder / "data", folder / "backup"
        self.artifacts = self.data / "artifacts"
        self.artifacts.mkdir(parents=True)
        self.backups.mkdir()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"

    def run(self, what: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Runs `backup` or `restore`."""
        return run(
            program("mlflow", "snapshots"),
            what,
            **{
                "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self.data}/mlflow.db",
                "AUTH_DATABASE_URI": f"sqlite:///{self.data}/basic_auth.db",
                "BACKUP_DIR": str(self.backups),
                "ARTIFACTS_DIR": str(self.artifacts),
                "RETENTION": "3",
                "SHARED_COPIES": "7",
                "SNAPSHOT": "latest",
                "SERVER": self.address,
                "SERVER_GRACE": "0",
                **more,
            },
        )

    def backup(self, **more: str) -> Path:
        """Makes a backup; returns its folder."""
        before = {path.name for path in self.backups.iterdir()}
        done = self.run("backup", **more)
        assert done.returncode == 0, done.stderr
        (new,) = [path for path in self.backups.iterdir() if path.name not in before]
        return new

    def write(self, text: str, database: str = "mlflow") -> None:
        """Inserts a row."""
        with closing(sqlite3.connect(self.data / f"{database}.db")) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("CREATE TABLE IF NOT EXISTS runs (name TEXT)")
            connection.execute("INSERT INTO runs VALUES (?)", (text,))
            connection.commit()

    def read(self, database: str = "mlflow") -> list[str]:
        """Returns all rows."""
        with closing(sqlite3.connect(self.data / f"{database}.db")) as connection:
            return [name for (name,) in connection.execute("SELECT name FROM runs ORDER BY rowid")]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    site = Site(tmp_path)
    site.write("first")
    site.write("admin", "basic_auth")
    (site.artifacts / "0").mkdir()
    (site.artifacts / "0" / "model").write_text("weights")
    return site


def test_what_was_backed_up_comes_back(site: Site) -> None:
    with closing(sqlite3.connect(site.data / "mlflow.db")) as writer:
        # A server has the file open, with an unfinished transaction.
        writer.execute("INSERT INTO runs VALUES ('unfinished')")
        site.backup()
    site.write("second")
    site.write("intruder", "basic_auth")
    (site.artifacts / "0" / "model").unlink()
    (site.artifacts / "0" / "newer").write_text("stays")
    done = site.run("restore")
    assert done.returncode == 0, done.stderr
    assert site.read() == ["first"]
    assert site.read("basic_auth") == ["admin"]
    assert (site.artifacts / "0" / "model").read_text() == "weights"
    assert (site.artifacts / "0" / "newer").read_text() == "stays"
    shutil.copy(site.data / "mlflow.db.before-restore", site.data / "before.db")
    assert site.read("before") == ["first", "second"]
    # A second restore is harmless, and the server can write again.
    assert site.run("restore").returncode == 0
    site.write("third")
    assert site.read() == ["first", "third"]


def test_an_empty_server_is_restored(site: Site) -> None:
    name = site.backup().name
    shutil.rmtree(site.data)
    site.artifacts.mkdir(parents=True)
    done = site.run("restore", SNAPSHOT=name)
    assert done.returncode == 0, done.stderr
    assert site.read() == ["first"]
    assert (site.artifacts / "0" / "model").read_text() == "weights"


def test_old_backups_go_and_unchanged_artifacts_take_no_space(site: Site) -> None:
    for name in ("20200101T000000Z", "20200102T000000Z", "20200103T000000Z"):
        site.backup(RETENTION="9").rename(site.backups / name)
    (site.backups / ".20200104T000000Z.unfinished").mkdir()
    (site.artifacts / "0" / "more").write_text("new")
    newest = site.backup()
    assert sorted(path.name for path in site.backups.iterdir()) == ["20200102T000000Z", "20200103T000000Z", newest.name]
    first = site.backups / "20200102T000000Z" / "artifacts" / "0" / "model"
    assert (newest / "artifacts" / "0" / "model").samefile(first)
    assert (newest / "artifacts" / "0" / "more").read_text() == "new"
    # A replaced file is copied, so the older backup keeps its content.
    (site.artifacts / "0" / "model").write_text("other weights")
    newest.rename(site.backups / "20200105T000000Z")
    newest = site.backup()
    assert (newest / "artifacts" / "0" / "model").read_text() == "other weights"
    assert (site.backups / "20200105T000000Z" / "artifacts" / "0" / "model").read_text() == "weights"


def test_a_damaged_backup_changes_nothing(site: Site) -> None:
    snapshot = site.backup()
    site.write("second")
    with open(snapshot / "mlflow.db", "r+b") as file:
        file.seek(100)
        file.write(b"damage")
    done = site.run("restore")
    assert done.returncode == 1
    assert "is damaged: its checksum" in done.stderr
    assert site.read() == ["first", "second"]


def damage(path: Path) -> None:
    """Flips a byte without a change of size and time."""
    about, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def make_older(snapshot: Path, days: int) -> Path:
    return snapshot.rename(snapshot.with_name(f"202001{20 - days:02d}T000000Z"))


DAMAGED = pytest.mark.attack(
    "M4",
    "one byte of an artifact flips, on the server's volume or on that of the backups",
    before="included in every backup, since all share one copy; a restore exited with 0 and kept the damaged file",
    now="reported by the next backup, which keeps the intact copy; a restore writes only files with the right checksum",
)


@DAMAGED
def test_a_live_file_that_changed_silently_is_named_and_the_good_copy_kept(site: Site) -> None:
    first, model = make_older(site.backup(), 1), site.artifacts / "0" / "model"
    damage(model)
    done = site.run("backup")
    assert done.returncode == 1
    assert f"{model} is damaged: its content changed, its size and time did not" in done.stderr
    (second,) = [path for path in site.backups.iterdir() if path != first]
    second = make_older(second, 0)
    assert (second / "artifacts" / "0" / "model").read_text() == "weights"
    assert site.run("restore").returncode == 0
    assert model.read_text() == "weights"
    assert site.run("backup").returncode == 0


@DAMAGED
def test_a_damaged_copy_is_named_and_the_next_backup_has_a_good_one(site: Site) -> None:
    first = make_older(site.backup(), 1)
    copy = first / "artifacts" / "0" / "model"
    damage(copy)
    done = site.run("backup")
    assert done.returncode == 1
    assert f"{copy} is damaged: its checksum is not the one in manifest.json" in done.stderr
    # The older backup can be restored again, with the copy of the newer one.
    (site.artifacts / "0" / "model").unlink()
    assert site.run("restore", SNAPSHOT=first.name).returncode == 0
    assert (site.artifacts / "0" / "model").read_text() == "weights"


@DAMAGED
def test_damage_to_one_copy_does_not_ruin_all_backups(site: Site) -> None:
    snapshots = [make_older(site.backup(RETENTION="9", SHARED_COPIES="2"), days) for days in (5, 4, 3, 2)]
    copies = [snapshot / "artifacts" / "0" / "model" for snapshot in snapshots]
    assert len({copy.stat().st_ino for copy in copies}) == 2
    damage(copies[-1])
    shutil.rmtree(site.artifacts)
    assert site.run("restore", SNAPSHOT=snapshots[-1].name).returncode == 0
    assert (site.artifacts / "0" / "model").read_text() == "weights"


@DAMAGED
def test_a_damaged_artifact_is_restored_by_nobody_and_the_rest_if_asked(site: Site) -> None:
    (site.artifacts / "0" / "other").write_text("intact")
    snapshot = site.backup()
    damage(snapshot / "artifacts" / "0" / "model")
    site.write("second")
    shutil.rmtree(site.artifacts / "0")
    done = site.run("restore")
    assert done.returncode == 1
    assert f"{snapshot / 'artifacts/0/model'} is damaged (not what manifest.json lists), and no other" in done.stdout
    assert "nothing was changed" in done.stderr
    assert site.read() == ["first", "second"]
    done = site.run("restore", PARTIAL="true")
    assert done.returncode == 1
    assert "restored without 0/model" in done.stderr
    assert site.read() == ["first"]
    assert [path.name for path in (site.artifacts / "0").iterdir()] == ["other"]


@pytest.mark.attack(
    "M4",
    "a user gives an artifact the longest possible path, or replaces a file by a folder",
    before="backups failed from then on, or a restore stopped after the databases",
    now="the file is reported and the rest is saved; files that block a restore are moved aside and reported",
)
def test_the_names_of_artifacts_stop_no_backup_and_no_restore(site: Site) -> None:
    long, deep = site.artifacts / ("l" * 255), site.artifacts / "1"
    long.write_text("long")
    (site.artifacts / "file").write_text("a file")
    (site.artifacts / "folder").mkdir()
    (site.artifacts / "folder/file").write_text("in a folder")
    longest = os.pathconf(site.artifacts, "PC_PATH_MAX") - 2
    while len(str(deep)) < longest - 255:
        deep /= "d" * 200
    deep.mkdir(parents=True)
    deep /= "d" * (longest - len(str(deep)) - 1)
    deep.write_text("deep")
    done = site.run("backup")
    assert done.returncode == 1
    assert f"{deep} is not in the backup: its path is too long" in done.stderr
    for name in ("file", "folder/file"):
        (site.artifacts / name).unlink()
    (site.artifacts / "folder").rmdir()
    (site.artifacts / "folder").write_text("a file now")
    (site.artifacts / "file").mkdir()
    (site.artifacts / "file/more").write_text("came later")
    long.unlink()
    done = site.run("restore")
    assert done.returncode == 0, done.stderr
    assert long.read_text() == "long"
    assert (site.artifacts / "file").read_text() == "a file"
    assert (site.artifacts / "folder/file").read_text() == "in a folder"
    assert {path.name for path in site.artifacts.glob(".before-restore-*/*")} == {"more"}
    assert deep.read_text() == "deep"


def test_a_backup_of_an_older_version_is_restored_and_built_upon(site: Site) -> None:
    snapshot = make_older(site.backup(), 1)
    manifest = json.loads((snapshot / "manifest.json").read_text())
    (snapshot / "manifest.json").write_text(json.dumps({**manifest, "artifacts": True}))
    (site.artifacts / "0" / "model").unlink()
    assert site.run("restore").returncode == 0
    assert (site.artifacts / "0" / "model").read_text() == "weights"
    assert (site.backup() / "artifacts" / "0" / "model").samefile(snapshot / "artifacts" / "0" / "model")


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ("[]", "databases"),
        ("{", "databases"),
        ('{"databases": ["mlflow.db"], "artifacts": {}}', "databases"),
        ('{"databases": {}}', "artifacts"),
        ('{"databases": {}, "artifacts": {"0/model": "abc"}}', "artifacts"),
        ('{"databases": {}, "artifacts": {"0/model": {"sha256": "abc"}}}', "artifacts"),
    ],
)
def test_a_backup_whose_manifest_has_another_form_is_named(site: Site, content: str, key: str) -> None:
    snapshot = make_older(site.backup(), 1)
    (snapshot / "manifest.json").write_text(content)
    problem = f"{snapshot / 'manifest.json'} is damaged: {key} is not a table of "
    site.write("second")
    done = site.run("restore")
    assert done.returncode == 1
    assert done.stderr.startswith(problem)
    assert done.stderr.endswith("; nothing was changed: choose another backup\n")
    assert site.read() == ["first", "second"]
    # The next backup is whole, and reports the damaged one.
    done = site.run("backup")
    assert done.returncode == 1
    assert done.stderr.startswith(problem)
    shutil.rmtree(site.artifacts / "0")
    assert site.run("restore").returncode == 0
    assert (site.artifacts / "0" / "model").read_text() == "weights"


def test_an_unknown_or_unfinished_backup_is_refused_by_name(site: Site) -> None:
    name = site.backup().name
    done = site.run("restore", SNAPSHOT="20200101T000000Z")
    assert done.returncode == 1
    assert f"no complete backup '20200101T000000Z'; there are: {name}" in done.stderr
    (site.backups / name / "manifest.json").unlink()
    done = site.run("restore")
    assert "no complete backup 'latest'; there are: none" in done.stderr


def test_a_restore_waits_until_the_server_has_ended(site: Site) -> None:
    site.backup()
    with serve(lambda *_: (200, "ok")) as port:
        text = program("mlflow", "snapshots").replace("seconds=300", "seconds=1")
        assert text != program("mlflow", "snapshots")
        environment = {"BACKUP_DIR": str(site.backups), "SNAPSHOT": "latest", "SERVER_GRACE": "0"}
        done = run(text, "restore", SERVER=f"127.0.0.1:{port}", **environment)
    assert done.returncode == 1
    assert "still runs: scale it to zero" in done.stderr


def test_postgresql_is_dumped_and_loaded_without_its_password_among_arguments(site: Site, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("pg_dump", "pg_restore"):
        (tools / tool).write_text(
            f'#!/bin/sh\nconnection="$PGUSER:$PGPASSWORD@$PGHOST:$PGPORT/$PGDATABASE $PGSSLMODE"\n'
            f'echo {tool} "$@" "$connection" >>{tmp_path}/log\n'
            'for word; do case $word in --file=*) echo dump >"${word#--file=}";; esac; done\n'
        )
        (tools / tool).chmod(0o755)
    uri = "postgresql+psycopg2://u:p%2Fw@db:5433/mlflow?sslmode=require"
    environment = {"MLFLOW_BACKEND_STORE_URI": uri, "AUTH_DATABASE_URI": uri, "PATH": f"{tools}:{os.environ['PATH']}"}
    environment["ARTIFACTS_DIR"] = ""
    assert (site.backup(**environment) / "mlflow.pgdump").read_text() == "dump\n"
    assert site.run("restore", **environment).returncode == 0
    dump, load = (tmp_path / "log").read_text().splitlines()
    for line in (dump, load):
        arguments, _, connection = line.rpartition(" u:")
        assert "p/w" not in arguments
        assert connection == "p/w@db:5433/mlflow require"
    assert "--single-transaction" in load
    assert "--dbname=mlflow" in load
