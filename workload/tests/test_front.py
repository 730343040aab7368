"""Clients' side of the router: TLS, keys, no access to its own paths. Replicas' side: DNS, and verified TLS.

The router is real with vLLM's environment (`-m vllm`), else a stub that records requests.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import uvicorn

from ictx.serve import front, gate
from ictx.serve.replicas import LOCAL_PORT, Replicas, local_address

KEY = "k" * 40
PYTHON = os.environ.get("ICTX_VLLM_PYTHON", "")


@dataclass
class Recorder:
    """An HTTP server that records its requests and responds with its name; as a router it has workers."""

    name: str
    port: int = 0
    workers: list[str] = field(default_factory=list)
    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    def handler(self) -> type[BaseHTTPRequestHandler]:
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path, _, query = self.path.partition("?")
                if path not in ("/list_workers", "/health"):
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    recorder.seen.append((f"{self.command} {self.path}", headers, body))
                if path == "/v1/completions" and json.loads(body).get("stream"):
                    self.stream()
                    return
                answer: object = {"name": recorder.name}
                if recorder.name == "router" and path == "/list_workers":
                    answer = {"urls": recorder.workers}
                elif recorder.name == "router" and path == "/add_worker":
                    recorder.workers.append(unquote(query.partition("=")[2]))
                elif recorder.name == "router" and path == "/remove_worker":
                    recorder.workers.remove(unquote(query.partition("=")[2]))
                elif path == "/v1/completions/render":
                    answer = {"token_ids": list(body)}
                content = json.dumps(answer).encode()
                self.send_response(
                    200 if recorder.workers or path != "/readiness" or recorder.name != "router" else 503
                )
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_DELETE = do_GET

            def stream(self) -> None:
                """Sends a part of a stream, waits until the client disconnects, and records that."""
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                try:
                    while True:
                        self.wfile.write(b"7\r\ndata: 1\r\n")
                        self.wfile.flush()
                        time.sleep(0.05)
                except OSError:
                    recorder.seen.append(("left", {}, b""))
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@contextmanager
def recording(name: str, address: str = "127.0.0.1", port: int = 0) -> Iterator[Recorder]:
    recorder = Recorder(name)
    with ThreadingHTTPServer((address, port), recorder.handler()) as server:
        server.daemon_threads = True
        recorder.port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield recorder
        finally:
            server.shutdown()


@dataclass
class Endpoint:
    """The clients' endpoint."""

    url: str

    def ask(self, method: str, path: str, body: object = None, key: str = KEY) -> tuple[int, str]:
        content = json.dumps(body).encode() if body is not None else None
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, content, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def wait_for(what: str, true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.05)


@contextmanager
def serving(folder: Path, router: str, replica_port: int, **more: str) -> Iterator[Endpoint]:
    """Serves the front on a free port, with the addresses of `localhost` as replicas."""
    (folder / "api-key").write_text(KEY)
    settings = {
        gate.KEYS: str(folder),
        "ICTX_ROUTER": router,
        "ICTX_REPLICAS": "127.0.0.1",
        "ICTX_REPLICAS_PORT": str(replica_port),
        **more,
    }
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listening:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setattr(front, "SECONDS", 0.2)
        server = uvicorn.Server(uvicorn.Config(front.app, factory=True, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def replica() -> Iterator[Recorder]:
    with recording("replica") as found:
        yield found


@pytest.fixture(scope="module")
def router() -> Iterator[Recorder]:
    with recording("router") as found:
        yield found


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory, router: Recorder, replica: Recorder) -> Iterator[Endpoint]:
    with serving(tmp_path_factory.mktemp("keys"), f"http://127.0.0.1:{router.port}", replica.port) as found:
        wait_for("the replica is registered", lambda: router.workers == [f"http://127.0.0.1:{LOCAL_PORT}"])
        yield found


def test_generation_goes_through_the_router_with_all_its_headers(endpoint: Endpoint, router: Recorder) -> None:
    assert endpoint.ask("POST", "/v1/completions?a=b", {"prompt": "x"}) == (200, '{"name": "router"}')
    request, headers, body = router.seen[-1]
    assert (request, json.loads(body)) == ("POST /v1/completions?a=b", {"prompt": "x"})
    assert headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "path",
    [
        *("/add_worker?url=http://192.0.2.1", "/remove_worker?url=http://127.0.0.1", "/list_workers", "/workers"),
        *("/v1/../add_worker?url=http://192.0.2.1", "/v1/completions/../../add_worker", "//add_worker", "/flush_cache"),
        *("/v1/completions%2f..%2f..%2fadd_worker", "/get_loads", "/readiness", "/v1/models", "/tokenize"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_nothing_else_reaches_the_router(
    endpoint: Endpoint, router: Recorder, replica: Recorder, method: str, path: str
) -> None:
    before, workers = len(router.seen), list(router.workers)
    assert endpoint.ask(method, path) == (200, '{"name": "replica"}')
    assert len(router.seen) == before
    assert router.workers == workers
    assert replica.seen[-1][0].startswith(f"{method} /")


def test_without_the_key_nothing_is_passed_on(endpoint: Endpoint, router: Recorder, replica: Recorder) -> None:
    before = len(router.seen), len(replica.seen)
    for path in ("/v1/completions", "/v1/models", "/add_worker?url=http://192.0.2.1"):
        assert endpoint.ask("POST", path, {"prompt": "x"}, key="wrong")[0] == 401
    assert (len(router.seen), len(replica.seen)) == before


def test_a_client_that_leaves_ends_its_request(endpoint: Endpoint, router: Recorder) -> None:
    content = json.dumps({"stream": True}).encode()
    request = urllib.request.Request(endpoint.url + "/v1/completions", content, {"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.read(7) == b"data: 1"
    wait_for("the router's reader leaves", lambda: router.seen[-1][0] == "left")


def test_a_router_that_is_restarted_gets_its_replicas_again(endpoint: Endpoint, router: Recorder) -> None:
    router.workers.clear()
    wait_for("it has them", lambda: router.workers == [f"http://127.0.0.1:{LOCAL_PORT}"])


def test_health_is_that_of_the_router(endpoint: Endpoint, router: Recorder, tmp_path: Path) -> None:
    assert endpoint.ask("GET", "/health", key="")[0] == 200
    with serving(tmp_path, "http://127.0.0.1:9", 9) as lonely:
        assert lonely.ask("GET", "/health", key="")[0] == 503
        assert lonely.ask("GET", "/v1/models")[0] == 503
        status, text = lonely.ask("POST", "/v1/completions", {"prompt": "x"})
        assert (status, json.loads(text)["error"]["code"]) == (502, 502)


def test_local_addresses_are_loopback_and_the_same_everywhere() -> None:
    assert local_address("10.42.3.7") == "127.42.3.7"
    assert local_address("fd00:42::7") == local_address("fd00:42:0:0::7")
    assert local_address("fd00:42::7") != local_address("fd00:42::8")
    assert local_address("fd00:42::7").startswith("127.")


def test_a_name_without_addresses_has_no_replicas() -> None:
    replicas = Replicas("http://127.0.0.1:9", "replicas.invalid", 8000)
    try:
        assert asyncio.run(replicas._ready()) == set()
    except socket.gaierror as error:
        assert error.errno == socket.EAI_AGAIN, "without a resolver the list of replicas is kept"


@pytest.mark.parametrize("name", ["ictx-serving", "another-service"])
def test_replicas_are_verified_by_the_name_of_the_service(
    tmp_path: Path, name: str, certificate: tuple[Path, Path, Path], router: Recorder
) -> None:
    """Certificates do not contain their addresses, and a certificate for another Service is rejected."""
    authority, crt, key = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(crt, key)
    more = {"ICTX_REPLICAS_NAME": name, "ICTX_REPLICAS_CA": str(authority), "ICTX_REPLICAS": "127.0.0.2"}
    recorder = Recorder("encrypted")
    with ThreadingHTTPServer(("127.0.0.2", 0), recorder.handler()) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with (
            recording("router") as own,
            serving(tmp_path, f"http://127.0.0.1:{own.port}", server.server_port, **more) as found,
        ):
            wait_for("the replica is registered", lambda: own.workers == [f"http://127.0.0.2:{LOCAL_PORT}"])
            answer = found.ask("GET", "/v1/models")
        server.shutdown()
    assert answer == (200, '{"name": "encrypted"}') if name == "ictx-serving" else answer[0] == 502


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Files of an authority, and of its certificate and key for the Service's name."""
    folder = tmp_path_factory.mktemp("tls")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=ictx-serving"]
    names = ["-addext", "subjectAltName=DNS:ictx-serving"]
    files = ["-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]
    subprocess.run([*make, *names, *files], check=True, capture_output=True)
    return folder / "tls.crt", folder / "tls.crt", folder / "tls.key"


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kills a process at the end of the block."""
    try:
        yield
    finally:
        process.terminate()


@pytest.mark.vllm
@pytest.mark.skipif(not PYTHON, reason="ICTX_VLLM_PYTHON is not set")
def test_the_real_router_keeps_a_beginning_on_one_replica_and_loses_none_when_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free, socket.create_server(("127.0.0.1", 0)) as other:
        port, metrics = str(free.getsockname()[1]), str(other.getsockname()[1])
    command = [Path(PYTHON).with_name("vllm-router"), "--port", port, "--prometheus-port", metrics]
    ready = {"127.0.0.3", "127.0.0.4"}

    async def listed(_: Replicas) -> set[str]:
        return ready

    monkeypatch.setattr(Replicas, "_ready", listed)
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL) as router,
        ended(router),
        recording("127.0.0.3", "127.0.0.3") as first,
        recording("127.0.0.4", "127.0.0.4", first.port),
        serving(tmp_path, f"http://127.0.0.1:{port}", first.port) as endpoint,
    ):
        scraped = f"http://127.0.0.1:{metrics}/metrics"
        wait_for("the router is ready", lambda: endpoint.ask("GET", "/health", key="")[0] == 200, 60)
        active = "vllm_router_active_workers 2"
        wait_for("it has both", lambda: active in urllib.request.urlopen(scraped).read().decode(), 60)

        def answers() -> list[str]:
            bodies = [{"model": "m", "prompt": f"{'the same ' * 400}{number}"} for number in range(10)]
            found = [endpoint.ask("POST", "/v1/completions", body) for body in bodies]
            assert {status for status, _ in found} == {200}
            return [json.loads(text)["name"] for _, text in found]

        (name,) = set(answers())
        assert 'outcome="prefix_hit"} 9' in urllib.request.urlopen(scraped).read().decode()
        ready.remove(name)
        assert answers()[-1] == ready.copy().pop()
