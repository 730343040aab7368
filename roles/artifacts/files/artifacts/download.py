"""Downloads one file over HTTP: resumes interrupted downloads, and verifies before moving into place."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import requests

from .lock import ArtifactError

TRIES = 3
CHUNK = 1 << 16
TIMEOUT = (10, 60)
Progress = Callable[[int, int], None]


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def reason(error: Exception) -> str:
    """Returns a short reason why a server was not reached."""
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy rejects the request"
    if isinstance(error, requests.exceptions.SSLError):
        return "its certificate is not trusted"
    if isinstance(error, requests.exceptions.Timeout):
        return "timeout"
    if isinstance(error, requests.exceptions.ConnectionError):
        return "name not known" if "resolution" in str(error) or "resolve" in str(error) else "no connection"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "truncated: the connection ended before the file did"
    return str(error)


def reachable(url: str, *, timeout: float = 5) -> str:
    """Returns why a URL is not available; empty if it is."""
    try:
        with requests.get(url, timeout=timeout, stream=True, headers={"Range": "bytes=0-0"}) as answer:
            return "" if answer.status_code in (200, 206, 401) else f"HTTP {answer.status_code}"
    except requests.RequestException as error:
        return reason(error)


def _receive(url: str, part: Path, progress: Progress) -> None:
    """Downloads the missing rest of `part`.

    Raises:
        requests.RequestException: the connection failed, or the server sent less than announced.
        OSError: the disk is full.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, stream=True, timeout=TIMEOUT, headers=headers) as answer:
        if answer.status_code == 416:  # The part is complete already.
            return
        answer.raise_for_status()
        have = have if answer.status_code == 206 else 0
        announced = answer.headers.get("Content-Length")
        total = have + int(announced or 0)
        free = shutil.disk_usage(part.parent).free
        if announced and int(announced) > free:
            raise OSError(errno.ENOSPC, f"{int(announced)} bytes to come, {free} free")
        with part.open("ab" if have else "wb") as file:
            for block in answer.iter_content(CHUNK):
                file.write(block)
                have += len(block)
                progress(have, total)


def download(url: str, target: Path, expected: str | None, progress: Progress = lambda _have, _total: None) -> str:
    """Downloads a URL, verifies it and moves it into place; returns its SHA-256.

    An incomplete download stays in TARGET.part, where the next call resumes; TARGET is complete or does not exist.

    Raises:
        ArtifactError: it is not available, or does not match.
    """
    part = target.with_name(target.name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in reversed(range(TRIES)):
        try:
            _receive(url, part, progress)
            break
        except requests.HTTPError as error:
            status = error.response.status_code
            if left == 0 or status < 500:
                raise ArtifactError(f"{url}: HTTP {status}") from None
        except requests.RequestException as error:
            if left == 0:
                kept = part.stat().st_size if part.exists() else 0
                raise ArtifactError(
                    f"{url}: {reason(error)}; {kept} bytes are kept: repeat the command to resume"
                ) from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                part.unlink(missing_ok=True)
                detail = f"the disk of {target.parent} is full ({error.strerror})"
                raise ArtifactError(f"{url}: {detail}: free some space and repeat the command") from None
            raise ArtifactError(f"{target}: {error.strerror}") from None
        time.sleep(0.5 * (TRIES - left))
    found = sha256(part)
    if expected and found != expected:
        part.unlink()
        raise ArtifactError(f"{url}: its SHA-256 is {found}, expected {expected}; it was not kept")
    os.replace(part, target)
    return found
