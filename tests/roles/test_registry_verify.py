"""ictx-registry-verify with a real registry: it finds and removes damaged blobs, which can be pushed again."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import ROOT
from programs import program

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = (
    "version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s}, cache: {blobdescriptor: inmemory}}\n"
)


def digest_of(content: bytes) -> str:
    """Returns the digest of a blob in the registry's notation."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Registry:
    """A registry on this machine, and requests of clients."""

    def __init__(self, folder: Path) -> None:
        self.storage = folder / "storage"
        with socket.create_server(("127.0.0.1", 0)) as found:
            self.port = found.getsockname()[1]
        self.file = folder / "config.yml"
        self.file.write_text(CONFIG % self.storage + f"http: {{addr: '127.0.0.1:{self.port}'}}\n")

    def start(self) -> None:
        """Starts it with an empty cache of blobs."""
        self.process = subprocess.Popen([program("docker-registry"), "serve", self.file])
        for _ in range(100):
            try:
                self.call("GET", "")
                return
            except (OSError, AssertionError):
                time.sleep(0.1)
        raise AssertionError("the registry does not answer")

    def stop(self) -> None:
        """Stops it."""
        self.process.terminate()
        self.process.wait()

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, str]:
        """Returns status, body and Location of a response."""
        url = path if path.startswith("http") else f"http://127.0.0.1:{self.port}/v2/{path}"
        request = urllib.request.Request(url, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read(), answer.headers.get("Location", "")
        except urllib.error.HTTPError as error:
            return error.code, b"", ""

    def push(self, name: str, content: bytes) -> dict[str, object]:
        """Pushes a blob unless it exists, as clients do; returns its descriptor."""
        digest = digest_of(content)
        if self.call("HEAD", f"{name}/blobs/{digest}")[0] == 404:
            place = self.call("POST", f"{name}/blobs/uploads/", b"")[2]
            put = self.call("PUT", f"{place}&digest={digest}", content, **{"Content-Type": "application/octet-stream"})
            assert put[0] == 201
        return {"mediaType": "application/octet-stream", "size": len(content), "digest": digest}

    def image(self, name: str, tag: str, *layers: bytes) -> str:
        """Pushes an image; returns its digest."""
        described = [self.push(name, layer) for layer in layers]
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": self.push(name, b"{}"), "layers": described}
        content = json.dumps(manifest).encode()
        assert self.call("PUT", f"{name}/manifests/{tag}", content, **{"Content-Type": MANIFEST})[0] == 201
        return digest_of(content)

    def has(self, name: str, reference: str) -> bool:
        """Returns whether a client can fetch a manifest."""
        return self.call("HEAD", f"{name}/manifests/{reference}", Accept=MANIFEST)[0] == 200

    def data(self, content: bytes) -> Path:
        """Returns the file of a blob."""
        (found,) = self.storage.rglob(f"{digest_of(content)[7:]}/data")
        return found

    def verify(self, *words: str) -> list[str]:
        """Returns the program's report, line by line."""
        command = [sys.executable, ROOT / "roles/registry/files/ictx-registry-verify", *words, self.storage]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry with two images that share a layer, and one without it."""
    made = Registry(tmp_path)
    made.start()
    made.image("ictx/training", "abc", b"base", b"training")
    made.image("ictx/serving", "abc", b"base", b"serving")
    made.image("ictx/mlflow", "3.1", b"other")
    yield made
    made.stop()


def test_a_damaged_layer_is_removed_and_can_be_pushed_again(registry: Registry) -> None:
    assert registry.verify() == []
    digest = registry.image("ictx/training", "abc", b"base", b"training")
    registry.data(b"base").write_bytes(b"ba5e")
    expected = [f"{digest_of(b'base')} is damaged, in serving:abc, training:abc"]
    assert registry.verify("--dry-run") == expected
    assert registry.has("ictx/training", digest)
    assert registry.verify() == expected
    registry.stop()
    registry.start()
    found = {name: registry.has(name, tag) for name, tag in (("ictx/training", digest), ("ictx/serving", "abc"))}
    assert found == {"ictx/training": False, "ictx/serving": False}
    assert registry.has("ictx/mlflow", "3.1")
    assert registry.verify() == []

    assert registry.image("ictx/training", "abc", b"base", b"training") == digest
    assert registry.call("GET", f"ictx/training/blobs/{digest_of(b'base')}")[1] == b"base"
    assert registry.verify("--all") == []


def test_a_missing_layer_and_a_damaged_manifest_are_found(registry: Registry) -> None:
    digest = registry.image("ictx/mlflow", "3.1", b"other")
    registry.data(b"serving").unlink()
    (manifest,) = registry.storage.rglob(f"blobs/sha256/*/{digest[7:]}/data")
    manifest.write_text("{}")
    assert registry.verify() == sorted(
        [f"{digest_of(b'serving')} is missing, in serving:abc", f"{digest} is damaged, in mlflow:3.1"]
    )
    registry.stop()
    registry.start()
    assert not registry.has("ictx/serving", "abc")
    assert not registry.has("ictx/mlflow", "3.1")
    assert registry.has("ictx/training", "abc")


def test_what_was_verified_today_is_not_read_again(registry: Registry) -> None:
    assert registry.verify() == []
    file = registry.data(b"base")
    about = file.stat()
    record = json.loads((registry.storage / "verified.json").read_text())
    assert record[digest_of(b"base")][1:4] == [about.st_dev, about.st_ino, about.st_size]
    # Silent corruption of the disk: only the content differs.
    file.write_bytes(b"ba5e")
    changed = file.stat()
    record[digest_of(b"base")][4:] = [changed.st_mtime_ns, changed.st_ctime_ns]
    (registry.storage / "verified.json").write_text(json.dumps(record))
    assert registry.verify() == []
    assert registry.verify("--dry-run", "--all") != []
    record[digest_of(b"base")][0] -= 25 * 3600
    (registry.storage / "verified.json").write_text(json.dumps(record))
    assert registry.verify() != []
