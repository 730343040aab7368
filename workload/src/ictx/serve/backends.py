"""Other releases behind one address: several models, or a share of a model's requests for a new version (canary).

vLLM's router (0.1.17) can also route by a request's `model` (`--enable-igw`), but without weights, keys or verified
TLS. Here each backend is the Service of another release; its `/v1/models` lists its models and adapters. If several
backends list a name, its requests are divided by their weights.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import ssl
from bisect import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from ictx.serve.gate import KEYS, accepted
from ictx.serve.replicas import LOGGER, Replicas

GOLDEN = 0.6180339887498949
"""Golden ratio: fractional parts of its multiples are evenly distributed, so that few requests match the weights."""
SESSION = (b"x-session-id", b"x-user-id")
"""Headers that bind a client to one version, and to one replica in the router."""


class Refused(Exception):
    """A request that no backend can serve: HTTP status and message."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(eq=False)
class Backend:
    """A release: its Service, its weight, and its last list of models."""

    service: str
    url: str
    weight: float = 100
    context: ssl.SSLContext | None = None
    cards: list[dict[str, Any]] | None = None
    """`data` of `/v1/models`; None until the first response."""
    up: bool = False
    tried: bool = False
    """Whether it has been queried for its list, with or without success."""
    _noted: str = ""

    def note(self, text: str) -> None:
        """Logs a text unless it is the same as the last one."""
        if text != self._noted:
            LOGGER.log(logging.INFO if self.up else logging.WARNING, "%s %s", self.service, text)
        self._noted = text

    @property
    def models(self) -> set[str]:
        """Names of the models in its last list."""
        return {card["id"] for card in self.cards or ()}


@dataclass
class Backends:
    """This release and the others; the first one is this release."""

    every: list[Backend]
    keys: Path
    _turn: itertools.count[int] = field(default_factory=itertools.count)
    _started: bool = False

    @property
    def own(self) -> Backend:
        """This release."""
        return self.every[0]

    async def follow(self, session: aiohttp.ClientSession, replicas: Replicas, seconds: float) -> None:
        """Updates the backends' lists of models until it is cancelled; a slow backend does not delay the others."""

        async def each(backend: Backend) -> None:
            while True:
                if backend is self.own:
                    backend.url = replicas.urls[0] if replicas.urls else ""
                await self._look(session, backend)
                await asyncio.sleep(seconds)

        await asyncio.gather(*(each(backend) for backend in self.every))

    async def _look(self, session: aiohttp.ClientSession, backend: Backend) -> None:
        try:
            if not backend.url:
                raise ConnectionError("no replica is ready")
            headers = {"Authorization": f"Bearer {accepted(self.keys)[0].decode()}"}
            url = f"{backend.url}/v1/models"
            async with session.get(url, headers=headers, ssl=backend.context or True) as answer:
                answer.raise_for_status()
                backend.cards = [card for card in (await answer.json())["data"] if isinstance(card["id"], str)]
        except (OSError, aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
            backend.up, backend.tried = False, backend.tried or bool(backend.url)
            backend.note(f"cannot list models: {error or type(error).__name__}")
            return
        backend.up = backend.tried = True
        backend.note(f"serves {', '.join(sorted(backend.models))}")

    def ready(self, router: bool, replicas: Replicas) -> bool:
        """Returns whether a request can be served; `router` is whether the router has a ready replica.

        A new pod is not ready until the state of every release is known: it would refuse requests for models of a
        release that it has not queried yet. Later a release without replicas does not make the pod unready, if another
        one responds.
        """
        others = [each for each in self.every if each is not self.own]
        if not self._started:
            own = replicas.known and (not replicas.urls or (router and self.own.tried))
            self._started = own and all(each.tried for each in others)
        return self._started and (router or any(each.up and each.weight for each in others))

    def listed(self) -> bytes:
        """Returns the response of `/v1/models`: the models of all available backends, each name once."""
        cards: dict[str, Any] = {}
        for backend in self.every:
            if backend.up and backend.weight:
                for card in backend.cards or ():
                    cards.setdefault(card["id"], card)
        return json.dumps({"object": "list", "data": list(cards.values())}).encode()

    def choose(self, model: str, session: bytes | None = None) -> list[Backend]:
        """Returns the backends for a model's request: the chosen one first, then the alternatives.

        A session always gets the same backend. Raises Refused: 404 for an unknown model, 503 if its backends are down.
        """
        able = [backend for backend in self.every if backend.weight and model in backend.models]
        ready = [backend for backend in able if backend.up]
        if ready:
            if session is None:
                point = next(self._turn) * GOLDEN % 1
            else:
                point = int.from_bytes(hashlib.sha256(session).digest()[:6], "big") / (1 << 48)
            ends = list(itertools.accumulate(backend.weight for backend in ready))
            first = ready[bisect(ends[:-1], point * ends[-1])]
            return [first, *(backend for backend in ready if backend is not first)]
        if able:
            raise Refused(503, f"the model `{model}` is not ready: {_names(able)} does not respond")
        if missing := [backend for backend in self.every if backend.cards is None]:
            raise Refused(503, f"the model `{model}` is not known yet: {_names(missing)} has not responded yet")
        names = sorted({name for backend in self.every for name in backend.models})
        raise Refused(404, f"the model `{model}` does not exist: served models are {', '.join(names)}")


def _names(backends: Iterable[Backend]) -> str:
    return ", ".join(backend.service for backend in backends)


def requested(body: bytes, headers: Iterable[tuple[bytes, bytes]]) -> tuple[str | None, bytes | None]:
    """Returns a request's model and session (a header, or the body's `user`); None for each that is missing."""
    try:
        content = json.loads(body)
    except ValueError:
        return None, None
    if not isinstance(content, dict):
        return None, None
    model, user = content.get("model"), content.get("user")
    session = next((value for name, value in headers if name.lower() in SESSION), None)
    if session is None and isinstance(user, str):
        session = user.encode()
    return model if isinstance(model, str) else None, session


def from_environment(environment: Mapping[str, str]) -> Backends | None:
    """Returns the releases set in the chart's variables; None without other releases."""
    others = json.loads(environment.get("ICTX_BACKENDS") or "[]")
    if not others:
        return None
    own = Backend(environment.get("ICTX_SERVICE", "this release"), "", float(environment.get("ICTX_WEIGHT", "100")))
    every = [own]
    for other in others:
        url = URL(other["url"])
        service = url.host or ""
        context = None
        if url.scheme == "https":
            # CA of the other release if set, else this release's, else the system's.
            files = [Path(environment.get("ICTX_BACKENDS_CA", "")) / f"{service}.crt"]
            files.append(Path(environment.get("ICTX_REPLICAS_CA", "")))
            context = ssl.create_default_context(cafile=next((str(file) for file in files if file.is_file()), None))
        every.append(Backend(service, other["url"].rstrip("/"), float(other["weight"]), context))
    return Backends(every, Path(environment[KEYS]))
