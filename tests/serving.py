"""The lab's served model, with its clients' access: through the node port, verified by the platform's authority."""

from __future__ import annotations

import json
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lab import STATE, Lab, wait_for

NAMESPACE, RELEASE, MODEL = "ictx", "ictx", "ictx-tiny"
SERVER = f"app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component=server"
AUTHORITY = STATE / "ca/ca.crt"


def endpoint() -> str:
    """Returns the URL."""
    return f"https://{Lab().address('kube1')}:30800"


def key() -> str:
    """Returns the key of the lab's clients."""
    return (STATE / "secrets/serving_api_key").read_text().strip()


def complete(secret: str, **more: Any) -> tuple[int, str]:
    """Requests a completion; returns status and text."""
    asked = {"model": MODEL, "prompt": "def f(", "max_tokens": 8, "temperature": 0, "ignore_eos": True, **more}
    body = json.dumps(asked).encode()
    request = urllib.request.Request(endpoint() + "/v1/completions", body, {"Content-Type": "application/json"})
    if secret:
        request.add_header("Authorization", f"Bearer {secret}")
    context = ssl.create_default_context(cafile=str(AUTHORITY))
    try:
        with urllib.request.urlopen(request, timeout=300, context=context) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def serves(secret: Callable[[], str] = key) -> bool:
    """Returns whether the served model responds."""
    try:
        return complete(secret())[0] == 200
    except OSError:
        return False


@dataclass
class Client:
    """Sends requests without pause until its block ends, and records every failure.

    It starts when the model responds, since the previous test may have restarted the node.
    """

    secret: Callable[[], str] = key
    answered: int = 0
    failures: list[str] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Client:
        wait_for("an answer of the served model", lambda: serves(self.secret))
        self.thread = threading.Thread(target=self.ask)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def ask(self) -> None:
        """Sends requests until the event is set."""
        while not self.done.is_set():
            try:
                status, text = complete(self.secret())
            except OSError as error:
                status, text = 0, str(error)
            if status == 200:
                self.answered += 1
            else:
                self.failures.append(f"{status} {text[:200]}")
            time.sleep(0.3)
