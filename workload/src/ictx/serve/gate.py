"""Authentication of vLLM's API: every request except `GET /health` needs an API key.

vLLM's own `--api-key` protects only some path prefixes; `/invocations` and `/tokenize` stay open. This ASGI middleware
(`--middleware ictx.serve.gate.Gate`) wraps all routes and mounts, including those that new versions add. Prometheus
scrapes a separate port that is not part of the clients' Service.
"""

from __future__ import annotations

import hmac
import json
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

KEYS = "ICTX_API_KEYS"
"""Variable with the folder of the keys: the files `api-key` and, while a key is rotated, `api-key-previous`."""
METRICS_PORT = "ICTX_METRICS_PORT"
"""Variable with the port that serves `/metrics` without a key; disabled if unset."""
ADMIN = "ICTX_ADMIN"
"""Variable with the folder of the key of `ictx adapters`; unset without adapters."""
ADMIN_KEY = "key"
"""File with the key in ADMIN."""
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
CLOSED = (LOAD, UNLOAD, "/adapters")
"""Paths, including subpaths, that are closed to clients; `/adapters` is SageMaker's name of the other two."""
FILES = ("api-key", "api-key-previous", "api-key")
"""Files to read, in this order; repeated because a file may be missing while kubelet replaces the folder."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def accepted(folder: Path) -> list[bytes]:
    """Returns the accepted keys. Read for each request, because a mounted Secret changes in place."""
    keys = []
    for name in FILES:
        try:
            keys.append((folder / name).read_bytes().strip())
        except FileNotFoundError:
            continue
    return [key for key in keys if key]


def presented(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """Returns the bearer key of a request; None unless it has exactly one `Authorization: Bearer` header."""
    values = [value for name, value in headers if name.lower() == b"authorization"]
    if len(values) != 1:
        return None
    scheme, _, key = values[0].partition(b" ")
    return key if scheme.lower() == b"bearer" else None


class MetricsServer(WSGIServer):
    """Listens on all addresses of the pod, also on IPv6 where the kernel supports it."""

    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def server_bind(self) -> None:
        """Binds one socket for both families."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def serve_metrics(port: int) -> None:
    """Serves this server's metrics on a separate port in a thread, always in the text format.

    In the OpenMetrics format prometheus_client renames `vllm:…` to `vllm_…`, which rules and dashboards do not use.
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

    server = make_server("", port, plain, MetricsServer, Quiet)
    Thread(target=server.serve_forever, daemon=True).start()


def closed(path: str) -> bool:
    """Returns whether an unquoted path loads or unloads adapters, also below a prefix."""
    return any(f"{name}/" in f"{path}/" for name in CLOSED)


async def hide(send: Send) -> None:
    """Sends 404, as for an unknown path."""
    body = b'{"detail":"Not Found"}'
    await send({"type": "http.response.start", "status": 404, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})


async def refuse(scope: Message, send: Send) -> None:
    """Sends 401; a WebSocket is rejected before its handshake."""
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
    """ASGI middleware that rejects requests without a valid key. Raises RuntimeError if no key is configured."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._folder = Path(os.environ[KEYS])
        if not accepted(self._folder):
            raise RuntimeError(f"{KEYS}={self._folder} has no key")

    def _administers(self, scope: Message) -> bool:
        """Returns whether a request comes from `ictx adapters`."""
        if ADMIN not in os.environ:
            return False
        key = presented(scope["headers"])
        try:
            own = (Path(os.environ[ADMIN]) / ADMIN_KEY).read_bytes().strip()
        except FileNotFoundError:
            return False  # `ictx adapters` has not started yet
        return bool(own) and key is not None and hmac.compare_digest(key, own)

    def _allows(self, scope: Message) -> bool:
        """Returns whether a request is allowed."""
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/health":
            return True
        key = presented(scope["headers"])
        if key is None:
            return False
        # Compares all keys, each in constant time, so that the duration does not depend on the keys.
        matches = [hmac.compare_digest(key, each) for each in accepted(self._folder)]
        return any(matches)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Forwards a request, or rejects it."""
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
