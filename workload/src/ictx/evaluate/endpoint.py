"""Client of OpenAI-compatible endpoints: vLLM, another server, or a provider."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from typing import IO, Any
from urllib.parse import urlsplit

from ictx.errors import UserError, printable
from ictx.settings import shown

PASSING = (408, 425, 429, 500, 502, 503, 504, 529)
"""HTTP statuses after which a retry may succeed."""
LONGEST_PAUSE = 60.0
LARGEST_ANSWER = 16 << 20


class Rejected(UserError):
    """The endpoint rejects the request (for example, the prompt is too long): a retry would fail too."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Rejects redirects, so that the key is sent only to the endpoint."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


@dataclass
class Endpoint:
    """An endpoint and the model that it serves. Thread-safe."""

    url: str
    """Base URL, including `/v1`."""
    model: str = ""
    """Name of the model at the endpoint; default: the only one that it serves."""
    key: str = field(default="", repr=False)
    """Bearer token; empty: none."""
    timeout: float = 600.0
    """Timeout of a request in seconds."""
    tries: int = 6
    """Maximum attempts of a request that fails with a transient error."""
    pause: float = 1.0
    """Seconds before the second attempt, ± 50 %; doubled before each later one."""
    retried: int = 0
    """Number of retries so far."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise UserError(f"{shown(self.url)} is not an endpoint: expected http://HOST:PORT/v1 or https://HOST/v1")
        self.url = self.url.rstrip("/")
        if any(not char.isprintable() or char.isspace() or not char.isascii() for char in self.key):
            raise UserError("the endpoint's key is not one line of printable ASCII without spaces: check it")
        self._opener = urllib.request.build_opener(_NoRedirect)

    def check(self) -> None:
        """Verifies that the endpoint accepts the key and serves the model; sets `model`. Raises UserError."""
        served = [str(each.get("id")) for each in self._field(self._once("/models", None), "data")]
        if not self.model and len(served) == 1:
            self.model = served[0]
        if self.model not in served:
            which = f"does not serve {shown(self.model)}" if self.model else "serves several models: name one"
            raise UserError(f"{self.url} {which} (available: {shown(', '.join(served))})")

    def chat(self, text: str, **sampling: Any) -> str:
        """Returns the answer to a user message; `sampling` is sent unchanged. Raises UserError, Rejected."""
        return self._text({"messages": [{"role": "user", "content": text}], **sampling}, "/chat/completions")

    def complete(self, prompt: Sequence[int] | str, **sampling: Any) -> str:
        """Returns the completion of a prompt, greedy unless `sampling` has a temperature. See `chat`."""
        return self._text({"prompt": prompt, "temperature": 0, **sampling}, "/completions")

    def _text(self, body: Mapping[str, Any], path: str) -> str:
        answer = self._retrying(path, {"model": self.model, **body})
        choice, *_ = self._field(answer, "choices") or [{}]
        text = choice.get("text", (choice.get("message") or {}).get("content"))
        if not isinstance(text, str):
            raise Rejected(f"{self.url}{path} returned no text: {shown(json.dumps(choice))}")
        return text

    def _field(self, answer: Any, name: str) -> list[dict[str, Any]]:
        found = answer.get(name) if isinstance(answer, dict) else None
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise UserError(f"{self.url} is not an OpenAI-compatible endpoint: its response has no list {name!r}")
        return found

    def _retrying(self, path: str, body: Mapping[str, Any]) -> Any:
        """Returns the response; retries transient errors. Raises UserError."""
        for number in range(1, self.tries + 1):
            try:
                return self._once(path, body)
            except _Passing as error:
                if number == self.tries:
                    raise UserError(f"{error}, {number} times: run the same command again to continue") from error
                pause = min(self.pause * 2 ** (number - 1) * random.uniform(0.5, 1.5), LONGEST_PAUSE)
                time.sleep(max(pause, error.seconds))
            with self._lock:
                self.retried += 1
        raise AssertionError("unreachable")

    def _once(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """Returns the response to one request. Raises UserError, _Passing, Rejected."""
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, {"Content-Type": "application/json"})
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                text = answer.read(LARGEST_ANSWER)
        except urllib.error.HTTPError as error:
            raise self._refused(error) from None
        except (OSError, urllib.error.URLError) as error:
            cause = getattr(error, "reason", error)
            slow = isinstance(cause, TimeoutError) or "timed out" in str(cause)
            what = f"does not respond within {self.timeout:g} s" if slow else f"cannot be reached ({cause})"
            raise _Passing(f"{self.url} {printable(what)}") from None
        try:
            return json.loads(text)
        except ValueError:
            raise UserError(
                f"{self.url} is not an OpenAI-compatible endpoint: it returned "
                f"{shown(text[:80].decode(errors='replace'))}"
            ) from None

    def _refused(self, error: urllib.error.HTTPError) -> UserError:
        said = shown(" ".join(error.read(4096).decode(errors="replace").split())[:160])
        if error.code in (401, 403):
            key = "rejects the key" if self.key else "requires a key (--key-env, --key-file)"
            return UserError(f"{self.url} {key}: HTTP {error.code}")
        if error.code in PASSING:
            after = error.headers.get("Retry-After", "")
            seconds = min(float(after), LONGEST_PAUSE) if after.isdecimal() else 0.0
            return _Passing(f"{self.url} returned HTTP {error.code} ({said})", seconds)
        if error.code in (400, 413, 422):
            return Rejected(f"{self.url} rejects the request: HTTP {error.code} ({said})")
        return UserError(f"{self.url} returned HTTP {error.code} ({said}): expected an OpenAI-compatible endpoint")


class _Passing(UserError):
    """A transient error: a retry may succeed."""

    def __init__(self, text: str, seconds: float = 0.0) -> None:
        super().__init__(text)
        self.seconds = seconds
        """Minimum seconds before a retry (the endpoint's Retry-After)."""
