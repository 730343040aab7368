"""Searches logs, command lines, facts, images, bundles and SLURM's state for the value of every secret."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from lab import STATE

pytestmark = [pytest.mark.lab, pytest.mark.full]

# Values are read from standard input, since arguments are in the list of processes. Only file names are printed.
SEARCH = """set -eu
values=$(mktemp)
trap 'rm -f "$values"' EXIT
cat >"$values"
search() { grep --files-with-matches --text --fixed-strings --file="$values" "$@" 2>/dev/null || [ $? -le 2 ]; }
journalctl --output=export --no-pager 2>/dev/null | search --label=journal - || true
search --recursive --devices=skip --exclude-dir=journal PLACES
for file in /proc/[0-9]*/cmdline; do search --null-data "$file"; done
"""
LOGS = "/var/log"
PLACES = {
    "ctl": f"{LOGS} /var/lib/slurm /shared/bundles /shared/images /opt/ictx",
    "n1": f"{LOGS} /var/spool/slurmd /run/slurm",
    "n2": f"{LOGS} /var/spool/slurmd /run/slurm",
    "svc1": LOGS,
    "kube1": LOGS,
}


def secrets() -> list[str]:
    """Returns the lines of all secrets: passwords, tokens, and the bodies of keys."""
    keys = [*(STATE / "ca").glob("**/*.key"), STATE / "ssh/id_ed25519"]
    files = [path for path in [*(STATE / "secrets").iterdir(), *keys] if path.is_file()]
    lines = [line.strip() for path in files for line in path.read_text().splitlines()]
    return [line for line in lines if len(line) >= 16 and not line.startswith("-----")]


def found(command: list[str | Path], places: str) -> str:
    """Returns the files that contain a secret; the command is a shell on the machine to search."""
    script = SEARCH.replace("PLACES", places)
    done = subprocess.run([*command, script], input="\n".join(secrets()), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def on(node: str) -> list[str | Path]:
    """Returns the command that runs a script on a node."""
    return ["ssh", "-F", STATE / "ssh/config", node, "--"]


def test_a_secret_is_found_where_it_must_be() -> None:
    assert "/etc/ictx/mlflow/researcher.env" in found(on("n1"), "/etc/ictx")


@pytest.mark.parametrize("node", PLACES)
def test_no_secret_lies_where_others_read(node: str) -> None:
    assert found(on(node), PLACES[node]) == ""


def test_no_secret_lies_in_facts_and_logs_of_the_control_host() -> None:
    root = Path(__file__).resolve().parents[2]
    places = [root / ".ansible", STATE.parent / "logs", *STATE.glob("*.json"), STATE / "images"]
    assert found(["bash", "-c"], " ".join(str(place) for place in places if place.exists())) == ""


def test_no_secret_lies_in_the_history_of_an_image() -> None:
    history = "docker image ls --quiet | sort --unique | xargs docker image inspect"
    script = f"values=$(mktemp); cat >$values; {history} | grep --count --fixed-strings --file=$values; rm $values"
    done = subprocess.run(
        [*on("svc1"), script], input="\n".join(secrets()), capture_output=True, text=True, check=False
    )
    assert done.stdout == "0\n", done.stderr
