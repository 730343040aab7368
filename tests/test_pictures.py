"""Pictures for README and documentation: a terminal session from a log, and pages that require a password."""

from __future__ import annotations

import base64
import threading
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cluster import ROOT
from programs import loaded

terminal, pictures = loaded(ROOT / "scripts/terminal-svg"), loaded(ROOT / "scripts/pictures")
AUTHORITY = "/etc/ssl/certs/ca-certificates.crt"


def test_a_session_is_the_summary_with_the_home_folder_as_tilde() -> None:
    log = ["TASK [x] ***", "ok: [ctl]", "  \x1b[1m ctl\x1b[0m  10.0.0.1    controller", "key  /home/me/key"]
    log += ["x" * 200, "", "   12 s  start", "   99 s  in all", "", "real 1m"]
    lines = terminal.session(log, "/home/me")
    assert [line[:20] for line in lines] == [
        "   ctl  10.0.0.1    controller"[:20],
        "key  ~/key",
        "x" * 20,
        "",
        "   12 s  start",
        "   99 s  in all",
    ]
    assert len(lines[2]) == terminal.COLUMNS
    assert lines[2].endswith("…")
    assert terminal.session(["a", "b"], "/home/me") == ["a", "b"]


def test_the_picture_is_svg_with_every_line() -> None:
    root = ET.fromstring(terminal.drawn("make lab", ["a < b & c", "", "=== d"]))
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["$ make lab", "a < b & c", "=== d"]


@pytest.fixture
def guarded() -> Iterator[str]:
    """A server that accepts one user name and password."""

    class Guarded(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            known = self.headers["Authorization"] == "Basic " + base64.b64encode(b"admin:secret").decode()
            self.send_response(200 if known else 401)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(f"{self.command} {self.path} ".encode() + content)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.skipif(not Path(AUTHORITY).exists(), reason="no CA bundle on this machine")
def test_chromium_needs_no_password_where_the_proxy_has_it(guarded: str) -> None:
    with pictures.signed_in(guarded, "admin", "secret", AUTHORITY) as url:
        with urllib.request.urlopen(f"{url}/page?a=1") as answer:
            assert (answer.read(), answer.headers["Content-Type"]) == (b"GET /page?a=1 ", "text/html")
        with urllib.request.urlopen(f"{url}/search", b"{}") as answer:
            assert answer.read() == b"POST /search {}"
    with (
        pictures.signed_in(guarded, "admin", "wrong", AUTHORITY) as url,
        pytest.raises(urllib.error.HTTPError, match="401"),
    ):
        urllib.request.urlopen(f"{url}/page")
