"""Ansible filters: redact secrets in text, by their values and by patterns."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

# Each pattern starts with a fixed text or at the start of a word, and has unbounded repetition only where nothing can
# fail afterwards, so that matching takes linear time for any text.

# A name that contains one of these is the name of a secret.
NAME = r"""(?:(?<!/etc/)pass(?:word|wd|phrase|code)?(?!e[ds])|_pwd|secret|credential|cookie|authorization|webhook
  |(?:api|access|private|secret|client|encryption|signing)[-_ ]?key|(?<![A-Za-z])_?auth(?![A-Za-z])
  # Numbers of tokens are not secrets, nor are tokenizers.
  |token(?!iz|s?["']?\s{0,3}[=:]\s{0,3}[\d.]{1,12}(?![\w.-])))"""
# Between the name and its value: the rest of the name, quotes, a separator.
REST = r"""[\w.-]{0,40}(?:\\?["'])?(?:\])?"""
# A shell word with its quotes; a quoted string of JSON, YAML or Python, also nested in other quotes.
WORD = r"""(?:\\?"(?:\\[^"\n]|[^"\\\n])*(?:\\?")?|'[^'\n]*'?|\\.|[^\s"'\\])+"""
LINE = r"""(?:\\?"(?:\\[^"\n]|[^"\\\n])*(?:\\?")?|'[^'\n]*'?|[^\n"'][^\n]*)"""
BLOCK = r"[|>][-+0-9]{0,2}[ \t]*(?:\n(?:/[^\s:]{1,200}:)?[ \t]+[^\n]*)+"

FORMS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern, re.VERBOSE | flags), replacement)
    for pattern, flags, replacement in [
        (
            r"-----BEGIN[ ][A-Z0-9 ]{0,40}PRIVATE[ ]KEY(?:[ ]BLOCK)?-----"
            r"(?:(?!-----END)[\s\S])*(?:-----END[ A-Z0-9]{0,60}-----)?",
            0,
            "[redacted]",
        ),
        (r"\$(?:2[abxy]|[1567]|y|gy|argon2\w{0,2}|scrypt|apr1)\$[./A-Za-z0-9$,=+-]{8,}", 0, "[redacted]"),
        (r"\{SHA\d{0,3}\}[A-Za-z0-9+/=]+", 0, "[redacted]"),
        (r"MUNGE:[A-Za-z0-9+/=]{8,}:?", 0, "[redacted]"),
        (r"(://[^\s/?#@:\"'<>]{0,255}):[^\s\"'<>]{1,2048}@", 0, r"\1:[redacted]@"),
        (r"(://)[^\s/?#@:\"'<>]{8,2048}@", 0, r"\1[redacted]@"),
        (
            r"(hooks\.slack\.com|discord(?:app)?\.com/api/webhooks|webhook\.office\.com|hooks\.zapier\.com)/[^\s\"'<>]+",
            re.IGNORECASE,
            r"\1/[redacted]",
        ),
        (r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{12,}", 0, "[redacted]"),
        (r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]*\.[A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]*)?", 0, "[redacted]"),
        (
            r"(?<![A-Za-z0-9])(?:hf_|gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|sk-|npm_|pypi-|AIza|K10(?=[0-9a-f]))[\w:.-]{8,}",
            0,
            "[redacted]",
        ),
        (r"\b(Bearer|Basic|Negotiate|Digest)([ ]{1,3})[A-Za-z0-9+/=._~:-]{4,}", 0, r"\1\2[redacted]"),
        (r"\b(bearer[ ]{1,3})[A-Za-z0-9+/=._~:-]{16,}", re.IGNORECASE, r"\1[redacted]"),
        (r"([?&](?:sig|signature|key|code|x-amz-\w{1,20})=)[^&\s\"'<>]+", re.IGNORECASE, r"\1[redacted]"),
        # The value is on separate lines, in a tag, after a separator with blanks, after a separator, or the next word.
        (rf"({NAME}{REST}\s{{0,3}}:[ \t]{{0,3}}){BLOCK}", re.IGNORECASE, r"\1[redacted]"),
        (rf"({NAME}{REST}>)[^<\n]+", re.IGNORECASE, r"\1[redacted]"),
        (
            rf"({NAME}{REST}(?:[ \t]{{0,8}}:[ \t]{{0,8}}|[ \t]{{1,8}}=[ \t]{{0,8}}|=[ \t]{{1,8}})){LINE}",
            re.IGNORECASE,
            r"\1[redacted]",
        ),
        (rf"({NAME}{REST}(?:=|[ ]{{0,2}}\()){WORD}", re.IGNORECASE, r"\1[redacted]"),
        (rf"(identified[ ]by[ ]{{1,3}}){WORD}", re.IGNORECASE, r"\1[redacted]"),
        (
            rf"(--(?:[A-Za-z0-9]{{1,20}}[-_]){{0,4}}{NAME}[\w-]{{0,20}}(?:[\"'],)?[\"']?[ \t]{{0,3}})"
            rf"(?<=[\s,]){WORD}",
            re.IGNORECASE,
            r"\1[redacted]",
        ),
        # curl --user NAME:PASSWORD, mysql -pPASSWORD, sshpass -p PASSWORD; a port stays.
        (rf"((?<!\S)(?:-u|--user|--proxy-user)[ =]?[\"']?[^\s:\"']{{1,64}}:){WORD}", 0, r"\1[redacted]"),
        (
            r"((?<![^\s\"'])-p)(?!(?:[\d.]{1,15}:)?\d{1,5}(?::\d{1,5})?(?:/\w+)?(?:[\s\"']|$))[^\s\"']+",
            0,
            r"\1[redacted]",
        ),
        (rf"(sshpass[ ]{{1,3}}-p[ ]{{1,3}}){WORD}", 0, r"\1[redacted]"),
    ]
]
SHORTEST = 8  # characters; shorter values are not searched for


def secret_value(path: str) -> str:
    """Returns the secret in a file; base64 if it is not text."""
    content = Path(path).read_bytes()
    try:
        return content.decode().split(" salt=")[0].strip()
    except UnicodeDecodeError:
        return base64.b64encode(content).decode()


def written(value: str) -> Iterator[str]:
    """Yields the encodings of a secret: plain, by line, URL, JSON, base64."""
    for text in {value, *value.splitlines()}:
        text = text.strip()
        if len(text) >= SHORTEST:
            raw = text.encode(errors="surrogatepass")
            yield from (
                text,
                quote(raw, safe=""),
                json.dumps(text)[1:-1],
                base64.b64encode(raw).decode().rstrip("="),
                raw.hex(),
            )


def without_forms(text: str) -> str:
    """Returns the text without anything that matches a pattern of secrets."""
    for pattern, replacement in FORMS:
        text = pattern.sub(replacement, text)
    return text


def redacted(text: str, secrets: Mapping[str, str]) -> str:
    """Returns the text without the secrets (name → value), and without anything that matches a pattern."""
    values = {form: name for name, value in secrets.items() for form in written(value)}
    for form in sorted(values, key=len, reverse=True):
        text = text.replace(form, f"[{values[form]}]")
    # A removed value may join two parts of a pattern.
    for _ in range(5):
        before, text = text, without_forms(text)
        if text == before:
            break
    return text


class FilterModule:
    """The filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Returns them by name."""
        return {"redacted": redacted, "secret_value": secret_value}
