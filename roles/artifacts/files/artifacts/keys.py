"""Keys of repositories, verified by fingerprint, and signed files."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .lock import ArtifactError

# Fingerprints after `pub` only; those after `sub` belong to subkeys.
PRIMARY = re.compile(r"^pub:.*\n(?:(?!sub:).*\n)*?fpr:+([0-9A-F]{40}):", re.MULTILINE)


def gpg(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs gpg without the user's keyring; it fails if its home does not exist."""
    try:
        with tempfile.TemporaryDirectory(prefix="artifacts-") as home:
            command = ["gpg", "--homedir", home, "--no-autostart", "--no-options", "--batch", "--quiet", *arguments]
            return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ArtifactError("gpg is required to read keys of repositories: install the package gpg") from None


def verify_key(key: Path, fingerprints: Sequence[str], url: str) -> None:
    """Checks that every primary key of a key file is expected.

    Raises:
        ArtifactError: it contains another key, or none.
    """
    found = sorted(PRIMARY.findall(gpg("--with-colons", "--show-keys", key).stdout))
    if not found or not set(found) <= set(fingerprints):
        raise ArtifactError(
            f"{url} contains the key {', '.join(found) or '(none readable)'}, "
            f"expected {', '.join(fingerprints)}; it was not kept"
        )


def signed_text(file: Path, key: Path, url: str) -> str:
    """Returns the text of an inline-signed file.

    Raises:
        ArtifactError: the key did not sign it.
    """
    with tempfile.TemporaryDirectory(prefix="artifacts-") as home:
        ring, text = Path(home, "key.gpg"), Path(home, "text")
        armored = b"BEGIN PGP" in key.read_bytes()[:200]
        if armored:
            gpg("--output", ring, "--dearmor", key)
        else:
            ring.write_bytes(key.read_bytes())
        command = ["gpgv", "--keyring", str(ring), "--output", str(text), str(file)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0 or not text.exists():
            raise ArtifactError(f"{url}: its signature does not match the key of the lock; it was discarded")
        return text.read_text()
