"""A client of OpenAI-compatible endpoints: vLLM, another server like it, or a provider."""

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
"""Statuses after which the same request may succeed."""
LONGEST_PAUSE = 60.0
LARGEST_ANSWER = 16 << 20


class Rejected(UserError):
    """The endpoint rejects the request (a prompt that is too long, for example): the same would fail again."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key is for the endpoint alone."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


@dataclass
class Endpoint:
    """An endpoint and the model that it serves. Several threads may use it."""

    url: str
    """Up to and with `/v1`."""
    model: str = ""
    """As the endpoint names it; the only one that it serves unless given."""
    key: str = field(default="", repr=False)
    """Sent as a bearer token; none unless given."""
    timeout: float = 600.0
    """Seconds for an answer."""
    tries: int = 6
    """How often a request is made that fails for a passing reason."""
    pause: float = 1.0
    """Seconds before the second try; each later one waits twice as long, within 50 %."""
    retried: int = 0
    """Requests that were made again."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise UserError(
                f"{shown(self.url)} is no endpoint: expected http://HOST:PORT/v1 or https://HOST/v1, without a name"
            )
        self.url = self.url.rstrip("/")
        if any(not char.isprintable() or char.isspace() or not char.isascii() for char in self.key):
            raise UserError("the endpoint's key has characters that no key has: expected one line")
        self._opener = urllib.request.build_opener(_NoRedirect)

    def check(self) -> None:
        """Finds out that the endpoint answers, takes the key and serves the model; sets `model`. Raises UserError."""
        served = [str(each.get("id")) for each in self._field(self._once("/models", None), "data")]
        if not self.model and len(served) == 1:
            self.model = served[0]
        if self.model not in served:
            which = f"does not serve {shown(self.model)}" if self.model else "serves several models: name one"
            raise UserError(f"{self.url} {which}: it has {shown(', '.join(served))}")

    def chat(self, text: str, **sampling: Any) -> str:
        """Returns the answer to a user's turn; `sampling` is sent as it is. Raises UserError, of which Rejected."""
        return self._text({"messages": [{"role": "user", "content": text}], **sampling}, "/chat/completions")

    def complete(self, prompt: Sequence[int] | str, **sampling: Any) -> str:
        """Returns what follows a prompt, the likeliest unless `sampling` has a temperature. See `chat`."""
        return self._text({"prompt": prompt, "temperature": 0, **sampling}, "/completions")

    def _text(self, body: Mapping[str, Any], path: str) -> str:
        answer = self._retrying(path, {"model": self.model, **body})
        choice, *_ = self._field(answer, "choices") or [{}]
        text = choice.get("text", (choice.get("message") or {}).get("content"))
        if not isinstance(text, str):
            raise Rejected(f"{self.url}{path} answers without text: {shown(json.dumps(choice))}")
        return text

    def _field(self, answer: Any, name: str) -> list[dict[str, Any]]:
        found = answer.get(name) if isinstance(answer, dict) else None
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise UserError(f"{self.url} is no OpenAI-compatible endpoint: its answer has no list {name!r}")
        return found

    def _retrying(self, path: str, body: Mapping[str, Any]) -> Any:
        """Returns the answer; a request that fails for a passing reason is made again."""
        for number in range(1, self.tries + 1):
            try:
                return self._once(path, body)
            except _Passing as error:
                if number == self.tries:
                    raise UserError(
                        f"{error}, {number} times: the same command goes on when it answers again"
                    ) from error
                pause = min(self.pause * 2 ** (number - 1) * random.uniform(0.5, 1.5), LONGEST_PAUSE)
                time.sleep(max(pause, error.seconds))
            with self._lock:
                self.retried += 1
        raise AssertionError("unreachable")

    def _once(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """Returns the answer to one request. Raises UserError, of which _Passing and Rejected."""
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
            what = f"gives no answer within {self.timeout:g} s" if slow else f"cannot be reached ({cause})"
            raise _Passing(f"{self.url} {printable(what)}") from None
        try:
            return json.loads(text)
        except ValueError:
            raise UserError(
                f"{self.url} is no OpenAI-compatible endpoint: it answers {shown(text[:80].decode(errors='replace'))}"
            ) from None

    def _refused(self, error: urllib.error.HTTPError) -> UserError:
        said = shown(" ".join(error.read(4096).decode(errors="replace").split())[:160])
        if error.code in (401, 403):
            key = "refuses the key" if self.key else "requires a key (--key-env, --key-file)"
            return UserError(f"{self.url} {key}: HTTP {error.code}")
        if error.code in PASSING:
            after = error.headers.get("Retry-After", "")
            seconds = min(float(after), LONGEST_PAUSE) if after.isdecimal() else 0.0
            return _Passing(f"{self.url} answers HTTP {error.code} ({said})", seconds)
        if error.code in (400, 413, 422):
            return Rejected(f"{self.url} rejects the request: HTTP {error.code} ({said})")
        return UserError(f"{self.url} answers HTTP {error.code} ({said}): expected an OpenAI-compatible endpoint")


class _Passing(UserError):
    """May succeed later."""

    def __init__(self, text: str, seconds: float = 0.0) -> None:
        super().__init__(text)
        self.seconds = seconds
        """To wait, as the endpoint requests."""
