"""The administrator's password with a server that is starting, and with an unexpected response."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from programs import play


@contextmanager
def answering(status: int) -> Iterator[str]:
    """Yields the address of a server that responds to every request with the status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "text"), [(503, ""), (404, "responds to the administrator with 404 (Status code was 404")]
)
def test_a_server_that_is_down_is_no_reason_to_stop_and_one_that_is_another_is(
    tmp_path: Path, status: int, text: str
) -> None:
    (tmp_path / "password").write_text("secret-of-the-test")
    with answering(status) as uri:
        variables = {
            "mlflow_users_uri": uri,
            "mlflow_users_ca_file": "",
            "mlflow_users_admin_password_file": str(tmp_path / "password"),
            "mlflow_users_admin_previous": "before",
        }
        done = play(tmp_path, [{"include_role": {"name": "mlflow_users", "tasks_from": "admin"}}], variables)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == (not text), output
    assert text in " ".join(output.split())
    assert "secret-of-the-test" not in output
