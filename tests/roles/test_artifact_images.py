"""Images of the lock, with real registries: fetched by digest, pushed into ours, and pulled from there by roles."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import yaml
from cluster import ROOT
from programs import play, program

sys.path.insert(0, str(ROOT / "roles/artifacts/files"))
from artifacts import __main__ as artifacts

PATH = "team/tool"


def free_port() -> int:
    """Returns an unused port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Returns a function that starts Debian's registry with TLS, with a password if a user is given.

    The function returns the registry's address.
    """
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PATH", f"{Path(program('skopeo')).parent}:{os.environ['PATH']}")
    subject = ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    files = ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "ca.crt"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *files],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    running: list[subprocess.Popen[bytes]] = []

    def start(user: str = "") -> str:
        port = free_port()
        config: dict[str, Any] = {
            "version": 0.1,
            "storage": {"filesystem": {"rootdirectory": f"{tmp_path}/{port}"}},
            "http": {
                "addr": f"127.0.0.1:{port}",
                "tls": {"certificate": f"{tmp_path}/ca.crt", "key": f"{tmp_path}/key.pem"},
            },
        }
        if user:
            hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
            (tmp_path / "htpasswd").write_text(f"{user}:{hashed}\n")
            config["auth"] = {"htpasswd": {"realm": "test", "path": f"{tmp_path}/htpasswd"}}
        (tmp_path / f"{port}.yml").write_text(yaml.safe_dump(config))
        command = [program("docker-registry"), "serve", f"{tmp_path}/{port}.yml"]
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return f"127.0.0.1:{port}"
            time.sleep(0.1)
        raise AssertionError("the registry does not listen")

    yield start
    for each in running:
        each.terminate()
        each.wait()


def publish(address: str, folder: Path, ca: Path) -> str:
    """Pushes an image of two platforms to a registry; returns its digest."""
    blobs = folder / "layout/blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(content: bytes, kind: str, **more: Any) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        media = f"application/vnd.oci.image.{kind}"
        return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(content), **more}

    manifests = []
    for architecture in ("amd64", "arm64"):
        rootfs = {"type": "layers", "diff_ids": []}
        described = {"architecture": architecture, "os": "linux", "rootfs": rootfs}
        config = blob(json.dumps(described).encode(), "config.v1+json")
        manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json"}
        content = json.dumps({**manifest, "config": config, "layers": []}).encode()
        platform = {"architecture": architecture, "os": "linux"}
        manifests.append(blob(content, "manifest.v1+json", platform=platform))
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests}
    top = blob(json.dumps(index).encode(), "index.v1+json")
    (folder / "layout/oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (folder / "layout/index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (folder / "certs").mkdir()
    (folder / "certs/ca.crt").write_bytes(ca.read_bytes())
    copy = ["copy", "--all", "--preserve-digests", f"--dest-cert-dir={folder}/certs", f"oci:{folder}/layout"]
    subprocess.run([program("skopeo"), *copy, f"docker://{address}/{PATH}:v1"], check=True, stdout=subprocess.DEVNULL)
    return str(top["digest"]).removeprefix("sha256:")


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> int:
    """Runs the program on the lock of the folder."""
    words = ("--lock", f"{folder}/lock.yml", "--mirror", f"{folder}/mirror", *words)
    monkeypatch.setattr(sys, "argv", ["artifacts", *words])
    return artifacts.main()


def lock(folder: Path, url: str, digest: str) -> None:
    """Writes a lock of one image."""
    entry = {"name": "tool", "version": "v1", "kind": "image", "url": url, "path": "images/tool.tar", "sha256": digest}
    about = {"licence": "MIT", "looked_at": date(2026, 1, 2), "end_of_life": None, "newest": "v1", "why": ""}
    (folder / "lock.yml").write_text(yaml.safe_dump({"artifacts_lock": [{**entry, **about}]}))


def test_an_image_goes_from_its_publisher_through_the_mirror_into_our_registry(
    registry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publisher, ours = registry(), registry("ictx")
    digest = publish(publisher, tmp_path, tmp_path / "ca.crt")
    lock(tmp_path, f"{publisher}/{PATH}", digest)
    # This host trusts a publisher's certificate, so requests and skopeo are configured to trust it.
    with monkeypatch.context() as trusting:
        trusting.setenv("REQUESTS_CA_BUNDLE", f"{tmp_path}/ca.crt")
        trusting.setenv("SSL_CERT_FILE", f"{tmp_path}/ca.crt")
        assert run(trusting, tmp_path, "fetch") == 0, capsys.readouterr().out
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "wrong").write_text("other\n")
    login = ("push", ours, "--ca", f"{tmp_path}/ca.crt", "--user", "ictx", "--password-file")
    assert run(monkeypatch, tmp_path, *login, f"{tmp_path}/wrong") == 1
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert f"{ours}/{PATH} cannot be pushed: " in printed[0]
    assert printed[0].endswith("authentication required")
    assert run(monkeypatch, tmp_path, *login, f"{tmp_path}/password") == 0
    assert capsys.readouterr().out.startswith("pushed tool v1\n")
    assert run(monkeypatch, tmp_path, *login, f"{tmp_path}/password") == 0
    assert capsys.readouterr().out.startswith("already there tool v1\n")

    # The role that runs an image finds it by its digest, in the first registry that has it.
    variables = {
        "kube_state_metrics_digest": f"sha256:{digest}",
        "kube_state_metrics_repository": PATH,
        "kube_state_metrics_kubeconfig": f"{tmp_path}/none",
        "kube_state_metrics_registries": [
            {"address": f"127.0.0.1:{free_port()}"},
            {"address": ours, "ca_file": f"{tmp_path}/ca.crt", "user": "ictx", "password_file": f"{tmp_path}/password"},
        ],
    }
    tasks: list[dict[str, Any]] = [
        {"ansible.builtin.include_role": {"name": "kube_state_metrics", "tasks_from": "image"}},
        {"ansible.builtin.include_role": {"name": "kube_state_metrics", "tasks_from": "image", "public": True}},
        {"ansible.builtin.debug": {"msg": "found {{ _kube_state_metrics_image }}"}},
    ]
    done = play(tmp_path, tasks[1:], variables)
    assert done.returncode == 0, done.stdout
    assert f"found {ours}/{PATH}@sha256:{digest}" in done.stdout
    assert "is not installed" not in done.stdout

    variables["kube_state_metrics_digest"] = f"sha256:{64 * '0'}"
    done = play(tmp_path, tasks[:1], variables)
    assert done.returncode == 0, done.stdout
    printed = " ".join(done.stdout.split())
    assert f"is not installed: {variables['kube_state_metrics_registries'][0]['address']} cannot be queried" in printed
    assert f"{ours} has no such image" in printed
    done = play(tmp_path, tasks[:1], {**variables, "kube_state_metrics_required": True})
    assert done.returncode != 0
    assert "is not available" in done.stdout


def test_what_is_not_mirrored_is_not_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock(tmp_path, "registry.invalid/team/tool", 64 * "0")
    assert run(monkeypatch, tmp_path, "push", "127.0.0.1:9", "tool") == 1
    assert "fetch it first" in capsys.readouterr().err
