"""The contents of an image are listed as CycloneDX, reproducibly, and attached to it in the registry."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
from cluster import ROOT
from cryptography.hazmat.primitives import serialization
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from roles.test_certificate_authority import KEY, certify
from roles.test_certificate_authority import issue as issue_certificate
from roles.test_certificate_authority import request as certificate_request

M9 = pytest.mark.attack(
    "M9",
    "A package with a known vulnerability is in an image that cannot be identified",
    before="images had no list of packages",
    now="a CycloneDX list of Debian and Python packages is pushed beside each image",
)
DIGEST = "sha256:" + 64 * "a"


def load(name: str) -> ModuleType:
    """Returns an Ansible module of the role."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"roles/image_bake/library/{name}.py")
    assert spec
    assert spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def listed(**options: Any) -> str:
    """Returns the CycloneDX document of an image."""
    given = {"name": "ictx/training", "digest": DIGEST, "created": "2026-01-02T03:04:05.678Z", "locks": [], **options}
    return load("image_sbom").list_image(given)


PACKAGES = [
    "os debian 12",
    "deb bash 5.2.15-2+b7 amd64",
    "pypi torch 2.13.0+cpu",
    "pypi Typing_Extensions 4.1",
    "pypi ictx 0.1",
]


@M9
def test_a_list_is_valid_and_has_every_package_with_its_hash() -> None:
    text = listed(packages=PACKAGES, locks=[str(ROOT / "workload/requirements/torch-cpu.txt")])
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    content = json.loads(text)
    assert content["bomFormat"] == "CycloneDX"
    assert content["metadata"]["component"]["version"] == DIGEST
    assert content["metadata"]["timestamp"].startswith("2026-01-02T03:04:05")
    found = {part.get("purl", part["name"]): part for part in content["components"]}
    assert set(found) == {
        "debian",
        "pkg:deb/debian/bash@5.2.15-2%2Bb7?arch=amd64&distro=debian-12",
        "pkg:pypi/torch@2.13.0%2Bcpu",
        "pkg:pypi/typing-extensions@4.1",
        "pkg:pypi/ictx@0.1",
    }
    lock = (ROOT / "workload/requirements/torch-cpu.txt").read_text()
    assert found["pkg:pypi/torch@2.13.0%2Bcpu"]["hashes"][0]["content"] in lock


def test_the_same_image_gives_the_same_list() -> None:
    assert listed(packages=PACKAGES) == listed(packages=[PACKAGES[0], *reversed(PACKAGES)])


class Handler(BaseHTTPRequestHandler):
    """The part of a registry that a push needs: https://distribution.github.io/distribution/spec/api/."""

    blobs: ClassVar[dict[str, bytes]] = {}
    manifests: ClassVar[dict[str, bytes]] = {}

    def _answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": "0", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_HEAD(self) -> None:
        """Returns whether a blob or manifest exists."""
        kind, name = self.path.split("/")[-2:]
        content = {"blobs": self.blobs, "manifests": self.manifests}[kind].get(name)
        if content is None:
            return self._answer(404)
        return self._answer(200, Docker_Content_Digest=f"sha256:{hashlib.sha256(content).hexdigest()}")

    def do_POST(self) -> None:
        """Starts an upload."""
        self._answer(202, Location="/v2/ictx/training/blobs/uploads/7?_state=x")

    def do_PUT(self) -> None:
        """Stores a blob, or a manifest whose blobs all exist."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        address = urlsplit(self.path)
        if "uploads" in address.path:
            digest = parse_qs(address.query)["digest"][0]
            assert digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
            self.blobs[digest] = content
        else:
            manifest = json.loads(content)
            assert all(part["digest"] in self.blobs for part in [manifest["config"], *manifest["layers"]])
            self.manifests[address.path.split("/")[-1]] = content
        self._answer(201)

    def log_message(self, *_: Any) -> None:
        """Suppresses the log of requests."""


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Runs a registry; yields its address and its authority's certificate."""
    certify(tmp_path)
    _, text, _ = issue_certificate(tmp_path, certificate_request(), names=("localhost",))
    (tmp_path / "host.crt").write_text(text)
    key = KEY.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "host.key").write_bytes(key)
    server = ThreadingHTTPServer(("localhost", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "host.crt", tmp_path / "host.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"localhost:{server.server_port}", tmp_path / "current.crt"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_attachment_is_pushed_once_and_found_by_the_images_digest(registry: tuple[str, Path]) -> None:
    address, authority = registry
    options = {
        "registry": address,
        "repository": "ictx/training",
        "digest": DIGEST,
        "suffix": "sbom",
        "media_type": "application/vnd.cyclonedx+json",
        "content": "{}",
        "ca_file": str(authority),
        "user": "ictx",
        "password": "secret",
    }
    attach = load("registry_attachment").attach
    tag = f"{DIGEST.replace(':', '-')}.sbom"
    assert attach(options, True) == (True, tag)
    assert Handler.manifests == {}
    assert attach(options, False) == (True, tag)
    assert attach(options, False) == (False, tag)
    layer = json.loads(Handler.manifests[tag])["layers"][0]
    assert layer["mediaType"] == "application/vnd.cyclonedx+json"
    assert Handler.blobs[layer["digest"]] == b"{}"
    assert attach({**options, "content": "[]"}, True)[0]
