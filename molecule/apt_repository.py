"""apt repositories for scenarios: packages of stand-ins, signed like a vendor's."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path


def package(pool: Path, name: str, version: str, depends: str = "", files: dict[str, str] | None = None) -> str:
    """Builds a package with files (text by path; programs begin with #!); returns its paragraph for Packages."""
    with tempfile.TemporaryDirectory() as work:
        control = (
            f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@example.org>\nDescription: x\n"
        )
        control += f"Depends: {depends}\n" if depends else ""
        Path(work, "DEBIAN").mkdir(mode=0o755)
        Path(work, "DEBIAN/control").write_text(control)
        for path, text in (files or {}).items():
            target = Path(work, path.lstrip("/"))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
            target.chmod(0o755 if text.startswith("#!") else 0o644)
        Path(work).chmod(0o755)
        file = pool / f"{name}_{version}_all.deb"
        subprocess.run(["dpkg-deb", "--build", "--root-owner-group", work, file], check=True, capture_output=True)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return f"{control}Filename: {pool.name}/{file.name}\nSize: {file.stat().st_size}\nSHA256: {digest}\n\n"


def publish(folder: Path, paragraphs: list[str], lists: str, fields: str, key: str) -> str:
    """Writes Packages and a signed release to a repository's folder; returns the key's fingerprint.

    Args:
        folder: folder of the release, with InRelease.
        lists: folder of Packages in it, empty for a flat repository.
        fields: fields of the release, without date and digests.
        key: file of the public key, relative to the folder.
    """
    plain = "".join(paragraphs).encode()
    packed = gzip.compress(plain)
    prefix = f"{lists}/" if lists else ""
    (folder / lists).mkdir(parents=True, exist_ok=True)
    (folder / lists / "Packages.gz").write_bytes(packed)
    release = f"{fields}Date: Thu, 01 Jan 2026 00:00:00 UTC\nSHA256:\n"
    # apt requires the plain list here, but downloads the packed one.
    for content, suffix in ((plain, ""), (packed, ".gz")):
        release += f" {hashlib.sha256(content).hexdigest()} {len(content)} {prefix}Packages{suffix}\n"
    (folder / "Release").write_text(release)
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "GNUPGHOME": home}

        def gpg(*words: str | Path) -> str:
            command = ["gpg", "--batch", "--quiet", "--yes", "--passphrase", "", *words]
            return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

        gpg("--quick-generate-key", "vendor <vendor@example.org>")
        listed = gpg("--with-colons", "--list-keys").splitlines()
        fingerprint = next(line.split(":")[9] for line in listed if line.startswith("fpr"))
        gpg("--output", folder / "InRelease", "--clearsign", folder / "Release")
        (folder / key).write_text(gpg("--armor", "--export"))
        subprocess.run(["gpgconf", "--kill", "all"], env=environment, check=False)
    return fingerprint
