"""Mail is sent only if the user's --mail-user is an address."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cluster import ROOT


def sent(folder: Path, recipient: str, subject: str = "Slurm Job_id=7 Name=x Began") -> list[str]:
    """Returns the arguments of the host's mail program, empty if it was not called."""
    mail, log = folder / "mail", folder / "log"
    mail.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >{log}\n")
    mail.chmod(0o755)
    program = folder / "ictx-mail"
    program.write_text((ROOT / "roles/slurm/files/ictx-mail").read_text().replace("/usr/bin/mail", str(mail)))
    done = subprocess.run(["sh", program, "-s", subject, recipient], capture_output=True, check=False)
    assert (done.returncode == 0) == log.exists()
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.attack(
    "C1",
    "sbatch --mail-user='--exec=!COMMAND' (or '|COMMAND'), where the controller has GNU mailutils",
    before="slurmctld ran the command as SlurmUser, who has all permissions in SLURM",
    now="SLURM sends mail through a program that accepts only an address",
)
@pytest.mark.parametrize(
    "recipient", ["--exec=!id", "-X!id", "|id", "/tmp/x", "+x", "", " ", "a b", "a\n|id", "a,|id", "$(id)", "é@x.org"]
)
def test_what_is_no_address_gets_no_mail(tmp_path: Path, recipient: str) -> None:
    assert sent(tmp_path, recipient) == []


@pytest.mark.parametrize("recipient", ["alice", "alice@example.org", "a.b+c@x-y.org"])
def test_an_address_gets_mail(tmp_path: Path, recipient: str) -> None:
    assert sent(tmp_path, recipient) == ["-s", "Slurm Job_id=7 Name=x Began", recipient]


def test_a_name_with_control_characters_adds_no_header(tmp_path: Path) -> None:
    assert sent(tmp_path, "alice", "Name=a\nBcc: b\x1b") == ["-s", "Name=a?Bcc: b?", "alice"]
