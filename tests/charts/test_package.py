"""Metadata for a chart repository: maintainers, sources, icon, changes; and verification of signed archives."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm import CHARTS, ROOT, HelmError, helm

SCRIPT = [sys.executable, str(ROOT / "scripts/chart-package")]


@pytest.mark.parametrize("chart", CHARTS)
def test_the_metadata_is_complete(chart: str) -> None:
    about: dict[str, Any] = yaml.safe_load((CHARTS[chart] / "Chart.yaml").read_text())
    assert about["maintainers"][0]["name"]
    assert all(source.startswith("https://") for source in about["sources"])
    assert about["icon"].startswith("data:image/svg+xml;base64,")
    notes = about["annotations"]
    assert notes["artifacthub.io/license"] == "Apache-2.0"
    for change in yaml.safe_load(notes["artifacthub.io/changes"]):
        assert change["kind"] in {"added", "changed", "deprecated", "removed", "fixed", "security"}
        assert change["description"]
    assert all(link["url"].startswith("https://") for link in yaml.safe_load(notes["artifacthub.io/links"]))
    assert "icon" not in helm("lint", str(CHARTS[chart]))


def run(*arguments: object, status: int = 0) -> str:
    done = subprocess.run([*SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_an_archive_names_its_home(tmp_path: Path) -> None:
    printed = run("--out", tmp_path, "--home", "https://charts.example.org").split()
    assert [Path(each).name.rpartition("-")[0] for each in printed] == ["mlflow", "serving"]
    assert yaml.safe_load(helm("show", "chart", printed[1]))["home"] == "https://charts.example.org"
    assert "expected https" in run("--out", tmp_path, "--home", "charts.example.org", status=2)
    assert "must be used together" in run("--out", tmp_path, "--sign", "somebody", status=2)


@pytest.mark.skipif(not shutil.which("gpg"), reason="gpg is not installed")
def test_a_signed_archive_verifies_and_a_changed_one_does_not(tmp_path: Path) -> None:
    home = tmp_path / "gpg"
    home.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch", "--pinentry-mode", "loopback", "--passphrase", "secret"]
    subprocess.run([*gpg, "--quick-generate-key", "Release team", "rsa2048"], check=True, capture_output=True)
    try:
        for kind, file in (("--export-secret-keys", "secret.gpg"), ("--export", "public.gpg")):
            (tmp_path / file).write_bytes(subprocess.run([*gpg, kind], check=True, capture_output=True).stdout)
    finally:
        subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "gpg-agent"], check=True)
    (tmp_path / "passphrase").write_text("secret")
    signing = ["--sign", "Release team", "--keyring", tmp_path / "secret.gpg"]
    archive = run("--out", tmp_path, *signing, "--passphrase-file", tmp_path / "passphrase").split()[1]
    public = ["--keyring", str(tmp_path / "public.gpg")]
    assert re.search("Signed by: Release team", helm("verify", archive, *public))
    with Path(archive).open("ab") as file:
        file.write(b"x")
    with pytest.raises(HelmError, match="sha256 sum does not match"):
        helm("verify", archive, *public)
