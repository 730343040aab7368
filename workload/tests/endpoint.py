"""A small HTTP server with OpenAI's protocol, which can fail as real servers do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], bytes]


def text(content: str) -> Answer:
    """Returns a response with a text, for chats and completions."""
    choice = {"message": {"role": "assistant", "content": content}, "text": content}
    return 200, {}, json.dumps({"choices": [choice]}).encode()


@dataclass
class Server:
    """The server's responses, and its received requests."""

    url: str = ""
    key: str = ""
    """Required in requests unless empty."""
    answer: Callable[[dict[str, Any]], Answer] = lambda body: text("")
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    failures: list[Answer] = field(default_factory=list)
    """Sent first, one for each request for a text."""
    slow: float = 0.0
    """Delay of each response, in seconds."""


@contextmanager
def serving(served: Server) -> Iterator[Server]:
    """Runs a server in a thread."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.respond(None)

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def respond(self, body: dict[str, Any] | None) -> None:
            served.keys.append(self.headers.get("Authorization", ""))
            if served.key and self.headers.get("Authorization") != f"Bearer {served.key}":
                status, headers, content = 401, dict[str, str](), b'{"error": "no"}'
            elif body is None:
                status, headers, content = 200, {}, json.dumps({"data": [{"id": "judge"}]}).encode()
            else:
                served.asked.append(body)
                time.sleep(served.slow)
                status, headers, content = served.failures.pop(0) if served.failures else served.answer(body)
            # A client closes the connection after its timeout.
            with suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Suppresses the log of requests."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
