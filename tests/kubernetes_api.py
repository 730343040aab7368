"""A Kubernetes API server with its store for one test: it keeps objects, and no controller acts on them."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from programs import CACHE, program


def free_port() -> int:
    """Returns an unused port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def kubectl(folder: Path) -> list[str]:
    """Returns kubectl with its options."""
    found = shutil.which("kubectl")
    assert found
    return [found, f"--kubeconfig={folder}/kubeconfig"]


@contextlib.contextmanager
def api_server(folder: Path) -> Iterator[None]:
    """Runs the lab's build of the API server, and writes its administrator's `folder/kubeconfig`."""
    client, peer, port = free_port(), free_port(), free_port()
    key = folder / "accounts.key"
    subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
    (folder / "tokens").write_text('secret,admin,1,"system:masters"\n')
    store = [
        program("etcd"), f"--data-dir={folder}/etcd", f"--listen-client-urls=http://127.0.0.1:{client}",
        f"--advertise-client-urls=http://127.0.0.1:{client}", f"--listen-peer-urls=http://127.0.0.1:{peer}",
    ]  # fmt: skip
    server = [
        str(CACHE / "kubernetes/current/kube-apiserver"),
        f"--etcd-servers=http://127.0.0.1:{client}", f"--secure-port={port}",
        "--bind-address=127.0.0.1", f"--cert-dir={folder}/pki", f"--token-auth-file={folder}/tokens",
        "--service-account-issuer=x", f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}",
        "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition", "--authorization-mode=AlwaysAllow",
        "--advertise-address=127.0.0.1",
    ]  # fmt: skip
    address = f"https://127.0.0.1:{port}"
    (folder / "kubeconfig").write_text(yaml.safe_dump({
        "apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": "x", "cluster": {"server": address, "insecure-skip-tls-verify": True}}],
        "users": [{"name": "x", "user": {"token": "secret"}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
    }))  # fmt: skip
    with (folder / "log").open("w") as log:
        started = [subprocess.Popen(command, stdout=log, stderr=log, cwd=folder) for command in (store, server)]
    try:
        end = time.monotonic() + 120
        while subprocess.run([*kubectl(folder), "get", "--raw=/readyz"], capture_output=True, check=False).returncode:
            assert time.monotonic() < end, (folder / "log").read_text()[-3000:]
            time.sleep(1)
        yield
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait()
