"""The replicas of a served model, provided to the router beside this process as plain HTTP on local addresses.

vLLM's router (`vllm-router`) registers only `http://` addresses, and certificates do not contain pods' addresses. So
each replica gets a local address here, from which connections are forwarded to the pod over TLS, verified with the name
of the Service. Ready replicas are taken from the DNS entry of a headless Service, which needs no access to the
Kubernetes API.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

LOGGER = logging.getLogger("uvicorn.error")
CHUNK = 1 << 16
"""Bytes to forward at a time."""
LOCAL_PORT = 30001
"""Port of the replicas' local addresses (127.0.0.0/8); not used by other processes of the pod."""


def local_address(replica: str) -> str:
    """Returns the local address (127.0.0.0/8) of a replica.

    Derived from the replica's address, so that all routers hash equally; of IPv4 it keeps the last three bytes, so that
    it is recognizable in metrics.
    """
    address = ipaddress.ip_address(replica)
    last = address.packed[1:] if address.version == 4 else hashlib.sha256(address.packed).digest()[:3]
    return str(ipaddress.IPv4Address(bytes([127]) + last))


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """Copies bytes until the source ends; the target's buffer bounds memory."""
    while data := await source.read(CHUNK):
        target.write(data)
        await target.drain()


@dataclass
class Replicas:
    """The ready replicas, each with a local listening socket, registered at the router.

    `host` and `port` are the headless Service's; `name` is the name in the replicas' certificate (None: plain HTTP).
    """

    router: str
    host: str
    port: int
    name: str | None = None
    authority: str | None = None
    local_port: int = LOCAL_PORT
    urls: list[str] = field(default_factory=list)
    known: bool = False
    """Whether `urls` has been updated at least once."""
    _servers: dict[str, asyncio.Server] = field(default_factory=dict)

    async def follow(self, session: aiohttp.ClientSession, seconds: float) -> None:
        """Synchronizes the router's list with DNS until it is cancelled."""
        try:
            while True:
                try:
                    await self.update(session, await self._ready())
                except (OSError, aiohttp.ClientError, TimeoutError) as error:
                    LOGGER.warning("cannot update the replicas of %s: %s", self.host, error or type(error).__name__)
                await asyncio.sleep(seconds)
        finally:
            for server in self._servers.values():
                server.close()

    async def _ready(self) -> set[str]:
        """Returns the addresses of the ready replicas, possibly none. Raises OSError if DNS fails."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            if error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
                return set()
            raise
        return {str(address[0]) for *_, address in found}

    async def update(self, session: aiohttp.ClientSession, ready: set[str]) -> None:
        """Opens and registers new replicas, and removes missing ones; requests in flight continue.

        Queries the router's list each time, because a restarted router has none.
        """
        async with session.get(f"{self.router}/list_workers") as answer:
            answer.raise_for_status()
            listed = set((await answer.json())["urls"])
        wanted = {f"http://{local_address(replica)}:{self.local_port}": replica for replica in ready}
        for url in listed - set(wanted):
            await self._send(session, "remove_worker", url)
        for url in set(self._servers) - set(wanted):
            self._servers.pop(url).close()
        for url, replica in wanted.items():
            if url not in self._servers:
                self._servers[url] = await self._listen(local_address(replica), replica)
        await asyncio.gather(*(self._send(session, "add_worker", url) for url in set(wanted) - listed))
        self.urls, self.known = sorted(wanted), True

    async def _send(self, session: aiohttp.ClientSession, what: str, url: str) -> None:
        async with session.post(f"{self.router}/{what}", params={"url": url}) as answer:
            text = await answer.text()
            LOGGER.info("%s %s: %s %s", what, url, answer.status, text)

    async def _listen(self, address: str, replica: str) -> asyncio.Server:
        """Returns a server that forwards its connections to a replica."""
        context = ssl.create_default_context(cafile=self.authority) if self.name else None

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            upstream: asyncio.StreamWriter | None = None
            copies: list[asyncio.Task[None]] = []
            try:
                answers, upstream = await asyncio.open_connection(
                    replica, self.port, ssl=context, server_hostname=self.name
                )
                copies = [asyncio.create_task(_copy(reader, upstream)), asyncio.create_task(_copy(answers, writer))]
                # Closes both directions when one ends: HTTP clients and servers here never close only one direction.
                await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
            except (OSError, ssl.SSLError) as error:
                LOGGER.warning("replica %s: %s", replica, error)
            finally:
                for copy in copies:
                    copy.cancel()
                for result in await asyncio.gather(*copies, return_exceptions=True):
                    if isinstance(result, Exception) and not isinstance(result, OSError):
                        LOGGER.warning("replica %s: %s", replica, result)
                for end in (upstream, writer):
                    if end is not None:
                        end.close()
                        with suppress(OSError, ssl.SSLError):
                            await end.wait_closed()

        return await asyncio.start_server(connected, address, self.local_port)


def from_environment(environment: Mapping[str, str]) -> Replicas:
    """Returns the replicas set in the chart's variables; without a CA file, the system's CAs are used."""
    authority = environment.get("ICTX_REPLICAS_CA", "")
    return Replicas(
        router=environment["ICTX_ROUTER"],
        host=environment["ICTX_REPLICAS"],
        port=int(environment.get("ICTX_REPLICAS_PORT", "8000")),
        name=environment.get("ICTX_REPLICAS_NAME") or None,
        authority=authority if Path(authority).is_file() else None,
    )
