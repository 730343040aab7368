"""The client of OpenAI-compatible endpoints: requests, retries, and errors, which are one line."""

from __future__ import annotations

import socket

import pytest
from endpoint import Server, serving, text

from ictx.errors import UserError
from ictx.evaluate.endpoint import Endpoint, Rejected

BUSY = (429, {"Retry-After": "0"}, b"busy")


def client(url: str, **changes: object) -> Endpoint:
    return Endpoint(url, "judge", **({"tries": 3, "pause": 0.001} | changes))  # type: ignore[arg-type]


def test_sampling_and_the_key_are_sent_and_the_key_is_not_shown() -> None:
    with serving(Server(key="s3cret", answer=lambda body: text("yes"))) as server:
        endpoint = client(server.url + "/", key="s3cret")
        endpoint.check()
        assert endpoint.chat("hello", temperature=0.3, top_p=0.5, repetition_penalty=1.1) == "yes"
        assert endpoint.complete([1, 2], max_tokens=7) == "yes"
    assert "s3cret" not in repr(endpoint)
    messages = [{"role": "user", "content": "hello"}]
    sampling = {"temperature": 0.3, "top_p": 0.5, "repetition_penalty": 1.1}
    assert server.asked[0] == {"model": "judge", "messages": messages, **sampling}
    assert server.asked[1] == {"model": "judge", "prompt": [1, 2], "temperature": 0, "max_tokens": 7}


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_passes_is_tried_again(status: int) -> None:
    failures = [(status, {}, b"later")] * 2
    with serving(Server(failures=failures, answer=lambda body: text("yes"))) as server:
        endpoint = client(server.url)
        assert endpoint.chat("hello") == "yes" and endpoint.retried == 2
        server.failures = [(status, {}, b"later")] * 9
        with pytest.raises(UserError, match=rf"returned HTTP {status} \(later\), 3 times: run the same command again"):
            endpoint.chat("hello")
        assert len(server.asked) == 6


def test_a_slow_answer_is_tried_again_and_then_ends_it() -> None:
    with (
        serving(Server(slow=0.5)) as server,
        pytest.raises(UserError, match=r"does not respond within 0\.05 s, 3 times"),
    ):
        client(server.url, timeout=0.05).chat("hello")


@pytest.mark.parametrize("key", ["", "wrong"])
def test_a_wrong_key_is_one_line_and_no_second_try(key: str) -> None:
    with serving(Server(key="right")) as server:
        reason = "rejects the key: HTTP 401" if key else r"requires a key \(--key-env, --key-file\): HTTP 401"
        for call in (Endpoint.check, lambda endpoint: endpoint.chat("hello")):
            with pytest.raises(UserError, match=reason) as error:
                call(client(server.url, key=key))
            assert not key or key not in str(error.value)
    assert len(server.keys) == 2


def test_nobody_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=f"{url} cannot be reached .*Connection refused"):
        client(url).check()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((200, {}, b"<html>"), "is not an OpenAI-compatible endpoint: it returned <html>"),
        ((200, {}, b"[]"), "is not an OpenAI-compatible endpoint: its response has no list 'choices'"),
        ((200, {}, b'{"choices": [{"message": {"content": null}}]}'), "returned no text"),
        ((200, {}, b'{"choices": []}'), "returned no text"),
        ((400, {}, b"too long\n\x1b[1m"), r"rejects the request: HTTP 400 \(.*too long"),
        ((404, {}, b"no"), r"returned HTTP 404 \(no\): expected an OpenAI-compatible endpoint"),
        ((302, {"Location": "http://127.0.0.1:1/"}, b"elsewhere"), "returned HTTP 302"),
    ],
)
def test_nonsense_is_one_line(answer: tuple[int, dict[str, str], bytes], reason: str) -> None:
    with serving(Server(failures=[answer])) as server, pytest.raises(UserError, match=reason) as error:
        client(server.url).chat("hello")
    assert "\n" not in str(error.value) and len(server.asked) == 1
    assert isinstance(error.value, Rejected) == (answer[0] == 400 or b"choices" in answer[2])


@pytest.mark.parametrize("url", ["", "ftp://x/v1", "http://", "http://me:pass@x/v1", "x:8000", "http://x/v1?key=1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="is not an endpoint: expected http"):
        Endpoint(url)


def test_the_model_is_the_only_one_that_is_served() -> None:
    with serving(Server()) as server:
        endpoint = Endpoint(server.url)
        endpoint.check()
        assert endpoint.model == "judge"
        with pytest.raises(UserError, match=r"does not serve other \(available: judge\)"):
            Endpoint(server.url, "other").check()
    with pytest.raises(UserError, match="key is not one line of printable ASCII"):
        Endpoint(server.url, key="a\nb")
