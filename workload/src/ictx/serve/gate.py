"""The gate in front of vLLM's API: every request but `GET /health` needs a key.

vLLM's own `--api-key` covers a few path prefixes: `/invocations` and `/tokenize` answer anybody. This ASGI middleware
(`--middleware ictx.serve.gate.Gate`) is around all that vLLM routes and mounts, so what a new version adds is behind it
too. Prometheus scrapes a port of its own, which is in no Service for clients.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

KEYS = "ICTX_API_KEYS"
"""Variable with the folder of the keys: the files `api-key` and, while a key is rotated, `api-key-previous`."""
METRICS_PORT = "ICTX_METRICS_PORT"
"""Variable with the port on which `/metrics` is served without a key; none if unset."""
ADMIN = "ICTX_ADMIN"
"""Variable with the folder of the key of the process that keeps the adapters; unset where there is none."""
ADMIN_KEY = "key"
"""The file in it."""
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
CLOSED = (LOAD, UNLOAD, "/adapters")
"""Paths, and what is below them, that are closed to clients; `/adapters` is another name of the two, SageMaker's."""
FILES = ("api-key", "api-key-previous", "api-key")
"""What is read, in this order: kubelet replaces the folder as a whole, and a file may be gone for an instant."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def accepted(folder: Path) -> list[bytes]:
    """Returns the keys that are accepted now: they are read for each request, as a mounted Secret changes in place."""
    keys = []
    for name in FILES:
        try:
            keys.append((folder / name).read_bytes().strip())
        except FileNotFoundError:
            continue
    return [key for key in keys if key]


def presented(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """Returns the bearer key of a request; None without exactly one `Authorization: Bearer`."""
    values = [value for name, value in headers if name.lower() == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, key = values[0].partition(b" ")
    return key if scheme.lower() == b"bearer" else None


def serve_metrics(port: int) -> None:
    """Serves this server's metrics on a port of its own, in a thread, as plain text whatever format is preferred.

    In OpenMetrics prometheus_client writes `vllm:…` as `vllm_…`, a name that no rule or dashboard has.
    """
    from prometheus_client import make_wsgi_app
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    negotiated = make_wsgi_app(get_prometheus_registry())

    def plain(environ: Message, start: Any) -> Any:
        environ.pop("HTTP_ACCEPT", None)
        return negotiated(environ, start)

    class Quiet(WSGIRequestHandler):
        def log_message(self, *words: Any) -> None:
            pass

    server = make_server("", port, plain, handler_class=Quiet)
    Thread(target=server.serve_forever, daemon=True).start()


def closed(path: str) -> bool:
    """Returns whether a path (unquoted, as routes are looked up) loads or unloads adapters, below a prefix too."""
    return any(f"{name}/" in f"{path}/" for name in CLOSED)


async def hide(send: Send) -> None:
    """Answers 404, as for a path that there is not."""
    body = b'{"detail":"Not Found"}'
    await send({"type": "http.response.start", "status": 404, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


async def refuse(scope: Message, send: Send) -> None:
    """Answers 401; a WebSocket is refused before its handshake."""
    prefix = "http"
    if scope["type"] == "websocket":
        prefix = "websocket.http"
        if f"{prefix}.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})
            return
    error = {"message": "a valid API key is required: Authorization: Bearer KEY", "type": "authentication_error"}
    headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
    await send({"type": f"{prefix}.response.start", "status": 401, "headers": headers})
    await send({"type": f"{prefix}.response.body", "body": json.dumps({"error": error}).encode()})


class Gate:
    """ASGI middleware that refuses what has no key. Without a key to compare with, the server does not start."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._folder = Path(os.environ[KEYS])
        if not accepted(self._folder):
            raise RuntimeError(f"{KEYS}={self._folder} has no key")

    def _administers(self, scope: Message) -> bool:
        """Returns whether a request is of the process that keeps the adapters."""
        if ADMIN not in os.environ:
            return False
        key = presented(scope["headers"])
        try:
            own = (Path(os.environ[ADMIN]) / ADMIN_KEY).read_bytes().strip()
        except FileNotFoundError:
            return False  # the process has not started
        return bool(own) and key is not None and hmac.compare_digest(key, own)

    def _allows(self, scope: Message) -> bool:
        """Returns whether a request passes."""
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/health":
            return True
        key = presented(scope["headers"])
        if key is None:
            return False
        # All are compared, each in constant time: the time taken depends on none of them.
        matches = [hmac.compare_digest(key, each) for each in accepted(self._folder)]
        return any(matches)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Hands a request on, or refuses it."""
        if scope["type"] == "lifespan":
            if port := os.environ.get(METRICS_PORT):
                serve_metrics(int(port))
        elif not self._administers(scope):
            if not self._allows(scope):
                await refuse(scope, send)
                return
            if scope["type"] == "http" and closed(scope["path"]):
                await hide(send)
                return
        await self._app(scope, receive, send)
