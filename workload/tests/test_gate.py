"""The gate of vLLM's API in a real server: only health is open without a key, for any request."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from wsgiref.simple_server import make_server

import pytest
import uvicorn
from fastapi import FastAPI, WebSocket
from hypothesis import given
from hypothesis import strategies as st

from ictx.serve import gate

KEY, OTHER = "k" * 40, "o" * 40


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mounted Secret."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "api-key").write_text(KEY + "\n")
    return folder


@pytest.fixture(scope="module")
def address(keys: Path) -> Iterator[tuple[str, int]]:
    """Serves an application with routes, a mounted app and a WebSocket, as vLLM's; yields its address."""
    app, mounted = FastAPI(), FastAPI()

    @app.get("/health")
    def health() -> str:
        return "inside"

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    def anything(path: str) -> str:
        return "inside"

    @app.websocket("/v1/realtime")
    async def realtime(connection: WebSocket) -> None:
        await connection.accept()

    @mounted.get("/")
    def metrics() -> str:
        return "inside"

    app.mount("/metrics", mounted)
    app.router.routes.insert(0, app.router.routes.pop())
    with pytest.MonkeyPatch.context() as patch, closing(socket.create_server(("127.0.0.1", 0))) as listening:
        patch.setenv(gate.KEYS, str(keys))
        app.add_middleware(gate.Gate)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield listening.getsockname()
        server.should_exit = True
        thread.join()


def ask(address: tuple[str, int], target: str, *headers: str, method: str = "GET") -> tuple[int, bytes]:
    """Sends a raw request, without the normalisation of clients; returns status and body."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {address[0]}", "Connection: close", *headers, "", ""]
    with closing(socket.create_connection(address, timeout=30)) as connection:
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return int(answer.split()[1]), answer


bearer = f"Authorization: Bearer {KEY}"


def test_a_key_opens_and_health_needs_none(address: tuple[str, int]) -> None:
    for target in ("/v1/completions", "/invocations", "/metrics/", "/tokenize"):
        status, answer = ask(address, target, bearer)
        assert (status, b"inside" in answer) == (200, True), target
    status, answer = ask(address, "/health")
    assert (status, b"inside" in answer) == (200, True)
    assert ask(address, "/v1/models", f"authorization: bearer {KEY}")[0] == 200


@pytest.mark.attack(
    "H1",
    "A client without a key requests paths besides /v1, with odd methods, spellings of /health and other credentials",
    before="vLLM answered /invocations, /tokenize, /metrics, /openapi.json and others",
    now="401 from a middleware around the whole API: only GET /health is open",
)
@pytest.mark.parametrize(
    "target",
    ["/", "/v1/models", "/invocations", "/metrics", "/metrics/", "/openapi.json", "/docs", "//health", "/health/",
     "/HEALTH", "/health/../v1/models", "/health/..%2fv1/models", "/v1/models/../../health", "/base/health",
     "/health%00", "/health;x", "/health%3fx", "/./health", "http://127.0.0.1/v1/models", "http://127.0.0.1//health",
     "*", f"/v1/models?api_key={KEY}", f"/v1/models?key={KEY}", "/health%2f..%2finvocations"],
)  # fmt: skip
def test_nothing_else_answers_without_a_key(address: tuple[str, int], target: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND"):
        status, answer = ask(address, target, method=method)
        assert status in ({400, 401} if target == "*" else {401}), (method, target)
        assert b"inside" not in answer


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "get", "Get"])
def test_health_is_open_to_get_alone(address: tuple[str, int], method: str) -> None:
    # Some servers accept only methods in upper case.
    assert ask(address, "/health", method=method)[0] in ({401} if method.isupper() else {400, 401})


@pytest.mark.parametrize(
    "headers",
    [
        ["Authorization: Bearer"], ["Authorization: Bearer "], ["Authorization:"], [f"Authorization: {KEY}"],
        [f"Authorization: Basic {KEY}"], [f"Authorization: Bearer {OTHER}"], [f"Authorization: Bearer {KEY[:-1]}"],
        [f"Authorization: Bearer {KEY}x"], [f"Authorization: Bearer {KEY} {KEY}"], [f"Authorization: Bearer  {KEY}"],
        [f"Authorization: Bearer\t{KEY}"], [f"X-Api-Key: {KEY}"], [f"Api-Key: {KEY}"], [f"Cookie: api_key={KEY}"],
        [bearer, f"Authorization: Bearer {OTHER}"], [f"Proxy-Authorization: Bearer {KEY}"],
        ["Authorization: Bearer \xff\xfe"], ["X-Forwarded-Prefix: /health"], ["X-Original-URL: /health"],
        ["X-HTTP-Method-Override: GET"], ["Origin: https://a", "Access-Control-Request-Method: POST"],
    ],
)  # fmt: skip
def test_other_credentials_are_refused(address: tuple[str, int], headers: list[str]) -> None:
    status, answer = ask(address, "/invocations", *headers)
    assert status == 401
    assert b"www-authenticate: Bearer" in answer


def test_keys_are_rotated_under_the_running_server(address: tuple[str, int], keys: Path) -> None:
    def works(key: str) -> bool:
        return ask(address, "/v1/models", f"Authorization: Bearer {key}")[0] == 200

    (keys / "api-key-previous").write_text(KEY)
    (keys / "api-key").write_text(OTHER)
    assert (works(KEY), works(OTHER)) == (True, True)
    (keys / "api-key-previous").unlink()
    assert (works(KEY), works(OTHER)) == (False, True)
    # With an empty Secret no key is accepted.
    (keys / "api-key").write_text("\n")
    assert [works(key) for key in (KEY, OTHER, "", "\n")] == [False] * 4
    (keys / "api-key").unlink()
    assert not works(OTHER)
    (keys / "api-key").write_text(KEY)
    assert works(KEY)


def test_a_file_that_is_gone_for_an_instant_refuses_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kubelet replaces a Secret's folder by renaming a link, during which a read can fail."""
    (tmp_path / "api-key").write_text(KEY)
    read, looks = Path.read_bytes, iter([True])

    def swapped(path: Path) -> bytes:
        if next(looks, False):
            raise FileNotFoundError
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", swapped)
    assert KEY.encode() in gate.accepted(tmp_path)


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_a_server_without_a_key_does_not_start(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gate.KEYS, str(tmp_path))
    if content is not None:
        (tmp_path / "api-key").write_text(content)
    with pytest.raises(RuntimeError, match="has no key"):
        gate.Gate(lambda *_: pytest.fail("reached"))
    monkeypatch.delenv(gate.KEYS)
    with pytest.raises(KeyError, match=gate.KEYS):
        gate.Gate(lambda *_: pytest.fail("reached"))


def answers(scope: dict[str, Any], keys: Path) -> tuple[bool, list[dict[str, Any]]]:
    """Returns whether the application was called, and the gate's messages."""
    reached, sent = [], []

    async def app(*_: object) -> None:
        reached.append(True)

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the body of a rejected request must not be read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(gate.KEYS, str(keys))
        asyncio.run(gate.Gate(app)(scope, receive, send))
    return bool(reached), sent


@given(
    kind=st.sampled_from(["http", "websocket", "webtransport"]),
    method=st.sampled_from(["GET", "POST", "OPTIONS", "HEAD", "get", ""]),
    path=st.one_of(st.text(), st.sampled_from(["/health", "/health/", "health", "//health", "/v1/models"])),
    root=st.sampled_from(["", "/", "/health", "/v1"]),
    headers=st.lists(
        st.tuples(
            st.sampled_from([b"authorization", b"Authorization", b"x-api-key", b"cookie"]),
            st.one_of(st.binary(), st.binary().map(b"Bearer ".__add__)),
        )
    ),
)
def test_without_the_key_only_get_health_reaches_the_server(
    keys: Path, kind: str, method: str, path: str, root: str, headers: list[tuple[bytes, bytes]]
) -> None:
    scope = {"type": kind, "method": method, "path": path, "root_path": root, "headers": headers}
    reached, sent = answers(scope, keys)
    assert reached == ((kind, method, path) == ("http", "GET", "/health"))
    assert reached or sent[0].get("status") == 401 or sent == [{"type": "websocket.close", "code": 1008}]


def test_a_websocket_is_refused_before_its_handshake(keys: Path) -> None:
    scope: dict[str, Any] = {"type": "websocket", "path": "/v1/realtime", "headers": [], "extensions": {}}
    assert answers(scope, keys) == (False, [{"type": "websocket.close", "code": 1008}])
    scope["extensions"] = {"websocket.http.response": {}}
    reached, sent = answers(scope, keys)
    assert not reached
    assert [message["type"] for message in sent] == ["websocket.http.response.start", "websocket.http.response.body"]
    assert answers({**scope, "headers": [(b"authorization", f"Bearer {KEY}".encode())]}, keys)[0]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_metrics_are_served_on_both_families(host: str) -> None:
    """Prometheus and the drain reach pods by IPv4, or by IPv6 where pods have only that."""
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")

    def application(_: Any, start: Any) -> list[bytes]:
        start("200 OK", [])
        return [b"metrics"]

    with make_server("", 0, application, gate.MetricsServer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with closing(HTTPConnection(host, server.server_port, timeout=10)) as connection:
            connection.request("GET", "/metrics")
            assert connection.getresponse().read() == b"metrics"
