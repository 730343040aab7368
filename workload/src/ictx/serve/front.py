"""What clients reach where several replicas serve a model: TLS and keys before vLLM's router, which has neither.

`vllm-router` listens on this pod alone, for whoever reaches it may add or remove workers. Generation goes through it
(`ROUTED`: it chooses the replica by prefix, session or load, and tries another where one fails). All else goes to a
replica directly: no other path of the router can be reached, and clients see what vLLM answers.

Where other releases stand behind the same address (`ictx.serve.backends`), a request goes to one that serves the model
that it names.

Served by uvicorn: `uvicorn ictx.serve.front:app`, behind `ictx.serve.gate.Gate`. Variables: those of the gate and of
`ictx.serve.replicas.from_environment` and `ictx.serve.backends.from_environment`.
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
"""Headers about one connection (RFC 9110, 7.6.1), besides those that follow from the body."""
DROPPED = HOP | {b"transfer-encoding", b"upgrade"}
OF_REQUESTS = frozenset({b"host", b"content-length", b"expect"})
"""Headers of requests that are made anew."""
SECONDS = 2.0
"""Between two looks at which replicas are ready, and at what other releases serve."""
SERVED_BY = b"x-ictx-served-by"
"""Header of answers: the Service of the release that answered, where there are several."""


def _passed_on(
    headers: Iterable[tuple[bytes, bytes]], besides: frozenset[bytes] = frozenset()
) -> list[tuple[bytes, bytes]]:
    return [(name.lower(), value) for name, value in headers if name.lower() not in DROPPED | besides]


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    """Yields a request's body; raises ConnectionError where the client left before its end."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client left")
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


async def _answer(send: Send, status: int, text: str) -> None:
    """Answers in vLLM's form of errors; `GET /health` too, whose readers look at the status alone."""
    await _send(
        send, status, json.dumps({"error": {"message": text, "code": status}} if status >= 400 else {}).encode()
    )


async def _send(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Front:
    """ASGI application that passes requests on, as they are, and their answers as they come."""

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
        """Follows the replicas from start to stop."""
        await receive()
        # No limit of time: reading a million tokens takes minutes, and the router has one of its own.
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
        """Answers 200 where the router has a replica to send requests to, or another release answers."""
        assert self._session is not None, "the server has not started"
        try:
            async with self._session.get(f"{self._replicas.router}/readiness") as answer:
                ready = answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            ready = False
        ready = ready or (self._backends is not None and any(backend.up for backend in self._backends.every))
        await _answer(send, 200 if ready else 503, "no replica is ready")

    async def _releases(self, scope: Message, body: bytes) -> list[Backend]:
        """Returns the releases that a request may go to, in turn; none where this one is alone. Raises Refused."""
        if self._backends is None:
            return []
        model, session = await asyncio.to_thread(requested, body, scope["headers"])
        return [self._backends.own] if model is None else self._backends.choose(model, session)

    def _target(self, scope: Message) -> str | None:
        """Returns whom a request goes to: the router, or the next replica; None without any."""
        if scope["method"] == "POST" and scope["path"] in ROUTED:
            return self._replicas.router
        urls = self._replicas.urls
        return urls[next(self._turn) % len(urls)] if urls else None

    async def _until_client_leaves(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes a request on; where its client leaves, the replica is to stop computing."""
        try:
            # Whole, as the router reads it whole too: only then can a client be watched.
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
        """Sends a request and returns its answer piece by piece."""
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
        """Sends a request to one target; returns False where nothing listens there and it is not the last one."""
        assert self._session is not None, "the server has not started"
        # The path as it came, `%2F` included: what was compared with ROUTED is what is sent there.
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
                raise  # the client must not take a part of an answer for all of it: uvicorn breaks the connection
            if isinstance(error, aiohttp.ClientConnectorError) and not last:
                return False
            await _answer(send, 502, "the replica that computed this request is gone: try again")
            return True
        await send({"type": "http.response.body", "body": b""})
        return True


def app() -> App:
    """Returns the application, behind the gate (`uvicorn --factory`)."""
    return Gate(Front(from_environment(os.environ), other_releases.from_environment(os.environ)))
