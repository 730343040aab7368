"""The endpoint of a model with several replicas: adds TLS and API keys in front of vLLM's router, which has neither.

`vllm-router` listens only inside this pod, because any of its clients could add or remove workers. Generation requests
(`ROUTED`) go through it: it chooses the replica by prefix, session or load, and retries on another one. All other
requests go to a replica directly, so that no other path of the router is exposed.

With other releases behind the same address (`ictx.serve.backends`), a request goes to a release that serves its model.

Served by uvicorn: `uvicorn ictx.serve.front:app`, behind `ictx.serve.gate.Gate`. Uses the variables of the gate, of
`ictx.serve.replicas.from_environment` and of `ictx.serve.backends.from_environment`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress

import aiohttp
from yarl import URL

from ictx.serve import backends as other_releases
from ictx.serve.backends import Backend, Backends, Refused, requested
from ictx.serve.gate import App, Gate, Message, Receive, Send
from ictx.serve.replicas import LOGGER, Replicas, from_environment

ROUTED = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"})
"""Paths whose POST goes through the router."""
HOP = frozenset({b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer"})
"""Hop-by-hop headers (RFC 9110, 7.6.1), except those about the body."""
DROPPED = HOP | {b"transfer-encoding", b"upgrade"}
OF_REQUESTS = frozenset({b"host", b"content-length", b"expect"})
"""Request headers that are not forwarded but set again."""
SECONDS = 2.0
"""Interval of the queries for ready replicas and for other releases' models."""
SERVED_BY = b"x-ictx-served-by"
"""Response header with the Service of the release that responded, if there are several."""


def _passed_on(
    headers: Iterable[tuple[bytes, bytes]], besides: frozenset[bytes] = frozenset()
) -> list[tuple[bytes, bytes]]:
    return [(name.lower(), value) for name, value in headers if name.lower() not in DROPPED | besides]


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    """Yields a request's body. Raises ConnectionError if the client disconnects before its end."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client left")
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


async def _answer(send: Send, status: int, text: str) -> None:
    """Sends a response in vLLM's error format; also for `GET /health`, whose clients read only the status."""
    await _send(
        send, status, json.dumps({"error": {"message": text, "code": status}} if status >= 400 else {}).encode()
    )


async def _send(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Front:
    """ASGI application that forwards requests unchanged and streams the responses."""

    def __init__(self, replicas: Replicas, backends: Backends | None = None) -> None:
        self._replicas = replicas
        self._backends = backends
        self._turn = itertools.count()
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handles a request, or the server's start and stop."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"] == "/health":
            await self._health(send)
        else:
            await self._until_client_leaves(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Tracks replicas and backends from startup to shutdown."""
        await receive()
        # No total timeout: prefill of a million tokens takes minutes, and the router has its own timeout.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        connector = aiohttp.TCPConnector(limit=0)
        brief = aiohttp.ClientTimeout(total=30)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False) as self._session,
            aiohttp.ClientSession(timeout=brief) as registering,
        ):
            following = [asyncio.create_task(self._replicas.follow(registering, SECONDS))]
            if self._backends:
                following.append(asyncio.create_task(self._backends.follow(registering, self._replicas, SECONDS)))
            await send({"type": "lifespan.startup.complete"})
            await receive()
            for task in following:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
        await send({"type": "lifespan.shutdown.complete"})

    async def _health(self, send: Send) -> None:
        """Sends 200 if the router has a ready replica, or another release responds (see `Backends.ready`)."""
        assert self._session is not None, "the server has not started"
        try:
            async with self._session.get(f"{self._replicas.router}/readiness") as answer:
                ready = answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            ready = False
        if self._backends:
            ready = self._backends.ready(ready, self._replicas)
        await _answer(send, 200 if ready else 503, "no replica is ready")

    async def _releases(self, scope: Message, body: bytes) -> list[Backend]:
        """Returns the releases for a request in order of preference; empty without backends. Raises Refused."""
        if self._backends is None:
            return []
        model, session = await asyncio.to_thread(requested, body, scope["headers"])
        return [self._backends.own] if model is None else self._backends.choose(model, session)

    def _target(self, scope: Message) -> str | None:
        """Returns the URL for a request: the router, or the next replica; None if no replica is ready."""
        if scope["method"] == "POST" and scope["path"] in ROUTED:
            return self._replicas.router
        urls = self._replicas.urls
        return urls[next(self._turn) % len(urls)] if urls else None

    async def _until_client_leaves(self, scope: Message, receive: Receive, send: Send) -> None:
        """Forwards a request; cancels it if the client disconnects, so that the replica stops computing."""
        try:
            # Reads the whole body first (as the router does), because only then can a disconnect be detected.
            body = b"".join([part async for part in _body(receive)])
        except ConnectionResetError:
            return
        working = asyncio.create_task(self._pass_on(scope, body, send))
        leaving = asyncio.ensure_future(receive())
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if not working.done():
            working.cancel()
        with suppress(asyncio.CancelledError):
            await working

    async def _pass_on(self, scope: Message, body: bytes, send: Send) -> None:
        """Forwards a request and streams the response."""
        if self._backends and scope["method"] == "GET" and scope["path"] == "/v1/models":
            await _send(send, 200, self._backends.listed())
            return
        try:
            releases = await self._releases(scope, body)
        except Refused as refusal:
            await _answer(send, refusal.status, str(refusal))
            return
        own = self._backends.own if self._backends else None
        choices: list[Backend | None] = [*releases] or [None]
        for number, release in enumerate(choices, 1):
            target = self._target(scope) if release is None or release is own else release.url
            if target is None:
                await _answer(send, 503, "no replica is ready")
                return
            if await self._try(scope, body, send, target, release, last=number == len(choices)):
                return

    async def _try(
        self, scope: Message, body: bytes, send: Send, target: str, release: Backend | None, last: bool
    ) -> bool:
        """Forwards a request to one target; returns False if the connection fails and it is not the last target."""
        assert self._session is not None, "the server has not started"
        # The router gets the decoded path, which was compared with ROUTED; replicas get the raw path, including `%2F`.
        raw = scope["path"] if target == self._replicas.router else scope["raw_path"].decode("latin-1")
        query = scope["query_string"].decode("latin-1")
        url = URL(f"{target}{raw}" + (f"?{query}" if query else ""), encoded=True)
        passed = _passed_on(scope["headers"], OF_REQUESTS)
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in passed]
        started = False
        try:
            async with self._session.request(
                scope["method"],
                url,
                headers=headers,
                data=body or None,
                allow_redirects=False,
                ssl=(release.context if release else None) or True,
                skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            ) as answer:
                named = [(SERVED_BY, release.service.encode())] if release else []
                start = {"status": answer.status, "headers": [*_passed_on(answer.raw_headers), *named]}
                await send({"type": "http.response.start", **start})
                started = True
                async for piece in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except (aiohttp.ClientError, TimeoutError) as error:
            LOGGER.warning("%s %s: %s", scope["method"], scope["path"], error)
            if started:
                raise  # uvicorn then aborts the connection, so that the client detects a truncated response
            if isinstance(error, aiohttp.ClientConnectorError) and not last:
                return False
            await _answer(send, 502, "the replica of this request failed: retry")
            return True
        await send({"type": "http.response.body", "body": b""})
        return True


def app() -> App:
    """Returns the application, behind the gate (`uvicorn --factory`)."""
    return Gate(Front(from_environment(os.environ), other_releases.from_environment(os.environ)))
