"""Several releases behind one address: routing by model, shares of a canary, and lost releases."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from test_front import certificate

from ictx.serve import front, gate
from ictx.serve.backends import Backend, Backends, Refused

__all__ = ["certificate"]
KEY = "k" * 40


@dataclass
class Release:
    """An HTTP server with vLLM's `/v1/models` and a router's `/list_workers`, which responds with its name."""

    name: str
    models: list[str]
    url: str = ""
    seen: list[str] = field(default_factory=list)
    lists: threading.Event = field(default_factory=threading.Event)
    """Set: `/v1/models` responds."""
    routes: bool = True
    """Whether a router is ready."""

    def handler(self) -> type[BaseHTTPRequestHandler]:
        release = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer: Any = {"name": release.name, "key": self.headers.get("Authorization")}
                if self.path == "/v1/models":
                    release.lists.wait(30)
                    answer = {"data": [{"id": model, "object": "model"} for model in release.models]}
                elif self.path == "/list_workers":
                    answer = {"urls": []}
                else:
                    release.seen.append(self.path)
                content = json.dumps(answer).encode()
                self.send_response(200 if release.routes or self.path != "/readiness" else 503)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@contextmanager
def running(
    name: str, *models: str, tls: tuple[Path, Path] | None = None, port: int = 0, lists: bool = True
) -> Iterator[Release]:
    release = Release(name, list(models))
    if lists:
        release.lists.set()
    with ThreadingHTTPServer(("127.0.0.1", port), release.handler()) as server:
        server.daemon_threads = True
        scheme, host = "http", "127.0.0.1"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            scheme, host = "https", "localhost"
        release.url = f"{scheme}://{host}:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield release
        finally:
            server.shutdown()


@contextmanager
def fronting(folder: Path, own: Release, *others: tuple[Release | str, float], **more: str) -> Iterator[str]:
    """Runs the front of a release with other releases; yields its URL after it has queried all of them."""
    (folder / "api-key").write_text(KEY)
    listed = [{"url": other if isinstance(other, str) else other.url, "weight": weight} for other, weight in others]
    settings = {
        gate.KEYS: str(folder),
        "ICTX_ROUTER": own.url,
        "ICTX_REPLICAS": "127.0.0.1",
        "ICTX_REPLICAS_PORT": own.url.rpartition(":")[2],
        "ICTX_SERVICE": own.name,
        "ICTX_BACKENDS": json.dumps(listed),
        **more,
    }
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listening:
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.setattr(front, "SECONDS", 0.1)
        server = uvicorn.Server(uvicorn.Config(front.app, factory=True, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            if own.lists.is_set():
                wait_until(lambda: own.models[0] in models(url))
                time.sleep(0.5)
            else:
                wait_until(lambda: models(url) == [])
            yield url
        finally:
            server.should_exit = True
            thread.join()


def send(url: str, path: str, body: object = None, **headers: str) -> tuple[int, Any, str]:
    """Returns status, response, and the release in the response's header."""
    request = urllib.request.Request(url + path, None if body is None else json.dumps(body).encode())
    for name, value in {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}.items():
        request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer), answer.headers.get("x-ictx-served-by", "")
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), ""


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def models(url: str) -> list[str]:
    try:
        return [card["id"] for card in send(url, "/v1/models")[1]["data"]]
    except OSError:
        return []


def test_a_request_goes_to_the_release_that_serves_its_model(tmp_path: Path) -> None:
    with (
        running("one", "small", "support") as one,
        running("two", "large") as two,
        fronting(tmp_path, one, (two, 100)) as url,
    ):
        assert models(url) == ["small", "support", "large"]
        for path in ("/v1/completions", "/tokenize"):
            for model, name in (("small", "one"), ("support", "one"), ("large", "two")):
                status, answer, served_by = send(url, path, {"model": model})
                assert (status, answer["name"], answer["key"]) == (200, name, f"Bearer {KEY}")
                assert served_by == ("one" if name == "one" else "127.0.0.1")
        assert send(url, "/v1/completions", {"prompt": "x"})[1]["name"] == "one", "no model: this release"
        status, answer, _ = send(url, "/v1/chat/completions", {"model": "huge"})
        assert status == 404
        assert answer["error"]["message"] == "the model `huge` does not exist: served models are large, small, support"
        two.models.append("sales")
        time.sleep(0.5)
        assert send(url, "/v1/completions", {"model": "sales"})[1]["name"] == "two", "adapters are found too"


def test_a_canary_gets_its_share_of_a_thousand_requests(tmp_path: Path) -> None:
    with (
        running("stable", "m") as stable,
        running("next", "m") as canary,
        fronting(tmp_path, stable, (canary, 10), ICTX_WEIGHT="90") as url,
    ):
        assert models(url) == ["m"]
        names = Counter(send(url, "/v1/completions", {"model": "m"})[1]["name"] for _ in range(1000))
        assert sum(names.values()) == 1000
        assert 97 <= names["next"] <= 103
        for number in range(20):
            body = {"model": "m", "user": f"user {number}"}
            assert len({send(url, "/v1/completions", body)[1]["name"] for _ in range(5)}) == 1, "a user keeps a release"
        sessions = Counter(
            send(url, "/v1/completions", {"model": "m"}, **{"X-Session-ID": str(number)})[1]["name"]
            for number in range(300)
        )
        assert 10 <= sessions["next"] <= 55, "users are divided in the same share"


def test_what_stands_in_when_a_release_is_gone(tmp_path: Path) -> None:
    with running("stable", "m") as stable, running("other", "n") as other:
        with (
            running("next", "m") as canary,
            fronting(tmp_path, stable, (canary, 50), (other, 100), ICTX_WEIGHT="50") as url,
        ):
            port = int(canary.url.rpartition(":")[2])
        del url
        with fronting(tmp_path, stable, (f"http://127.0.0.1:{port}", 50), (other, 100), ICTX_WEIGHT="50") as url:
            answers = [send(url, "/v1/completions", {"model": "m"}) for _ in range(20)]
            assert {(status, answer["name"]) for status, answer, _ in answers} == {(200, "stable")}
            status, answer, _ = send(url, "/v1/completions", {"model": "huge"})
            assert status == 503
            assert "is not known yet: 127.0.0.1 has not responded yet" in answer["error"]["message"]


def test_a_new_pod_is_ready_once_it_has_queried_every_release(tmp_path: Path) -> None:
    with running("one", "small", lists=False) as one, running("two", "large", lists=False) as two:
        gone = "http://127.0.0.1:9"
        with fronting(tmp_path, one, (two, 100), (gone, 100)) as url:
            for release in (one, two):
                assert send(url, "/health")[0] == 503
                release.lists.set()
                wait_until(lambda name=release.models[0]: name in models(url))  # type: ignore[misc]
            assert send(url, "/health")[0] == 200, "a release that does not respond does not hold it back"
            for model in ("small", "large"):
                assert send(url, "/v1/completions", {"model": model})[0] == 200


@pytest.mark.parametrize("weight", [0, 100])
def test_a_new_pod_waits_for_its_own_router_and_later_does_without(tmp_path: Path, weight: float) -> None:
    with running("one", "m") as one, running("two", "m") as two:
        one.routes = False
        with fronting(tmp_path, one, (two, weight)) as url:
            assert send(url, "/health")[0] == 503
            one.routes = True
            assert send(url, "/health")[0] == 200
            one.routes = False
            assert send(url, "/health")[0] == (200 if weight else 503)


def test_a_connection_that_is_refused_goes_to_the_next_release() -> None:
    up, down = Backend("up", "http://up"), Backend("down", "http://down")
    up.cards = down.cards = [{"id": "m"}]
    backends = Backends([up, down], Path())
    with pytest.raises(Refused, match="`m` is not ready: up, down does not respond") as caught:
        backends.choose("m")
    assert caught.value.status == 503
    up.up = True
    assert backends.choose("m") == [up]
    down.up = True
    assert sorted(each.service for each in backends.choose("m")) == ["down", "up"]
    down.weight = 0
    assert {backends.choose("m")[0] for _ in range(50)} == {up}
    assert backends.choose("m") == [up], "weight 0 gets no requests, even if the other fails"


def test_releases_are_verified_by_their_own_authority(tmp_path: Path, certificate: tuple[Path, Path, Path]) -> None:
    """A release with another authority is verified only with the file of its own name."""
    authority, crt, key = certificate
    with running("one", "small") as one, running("two", "large", tls=(crt, key)) as two:
        with fronting(tmp_path, one, (two, 100), ICTX_REPLICAS_CA=str(authority)) as url:
            # The certificate is for `ictx-serving`, the address is `localhost`.
            assert models(url) == ["small"]
        with pytest.MonkeyPatch.context() as patch:
            found = socket.getaddrinfo
            patch.setattr(
                socket,
                "getaddrinfo",
                lambda host, *rest, **more: found("localhost" if host == "ictx-serving" else host, *rest, **more),
            )
            two.url = two.url.replace("localhost", "ictx-serving")
            (tmp_path / "ictx-serving.crt").write_bytes(authority.read_bytes())
            with fronting(tmp_path, one, (two, 100), ICTX_BACKENDS_CA=str(tmp_path)) as url:
                assert models(url) == ["small", "large"]
                assert send(url, "/v1/completions", {"model": "large"})[2] == "ictx-serving"
            (tmp_path / "ictx-serving.crt").unlink()
            with fronting(tmp_path, one, (two, 100), ICTX_BACKENDS_CA=str(tmp_path)) as url:
                assert models(url) == ["small"]
