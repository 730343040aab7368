"""`scripts/progress`: one line on a terminal, every line elsewhere, and the cause of a failure from the log."""

from __future__ import annotations

import os
import pty
import subprocess
from pathlib import Path

import pytest
from cluster import ROOT
from programs import loaded

PROGRAM = ROOT / "scripts/progress"
progress = loaded(PROGRAM)

PLAY = """
- hosts: localhost
  gather_facts: false
  tasks:
    - name: Fail and go on
      ansible.builtin.fail: {msg: ignored}
      ignore_errors: true
    - name: Read what is there
      ansible.builtin.debug: {msg: here}
    - name: Install the thing
      ansible.builtin.fail: {msg: "no room on /srv: remove something"}
"""


def test_the_cause_of_a_failed_playbook_is_its_host_task_and_message(tmp_path: Path) -> None:
    (tmp_path / "play.yml").write_text(PLAY)
    log = tmp_path / "log"
    command = (
        f"ansible-playbook -i localhost, -c local {tmp_path / 'play.yml'} 2>&1 | {PROGRAM} --log {log} 'the playbook'"
    )
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, "the playbook's exit status"
    assert "here" in done.stdout, "without a terminal everything is printed"
    why = subprocess.run([PROGRAM, "--log", log, "--why", "the playbook"], capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=1) for line in why.stdout.splitlines()]
    assert ["host", "localhost"] in lines
    assert ["task", "Install the thing"] in lines
    assert ["cause", "msg: 'no room on /srv: remove something'"] in lines
    assert ["log", str(log)] in lines
    assert "ignored" not in why.stdout


def test_without_a_playbook_the_last_lines_of_this_step_are_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("=== one\nfatal: [n1]: FAILED! =>\n    msg: of the step before\n=== two\nhello\nfailed with 3\n")
    assert progress.explain("two", log).splitlines()[1:4] == ["  === two", "  hello", "  failed with 3"]


@pytest.mark.parametrize("verbose", ["", "1"])
def test_a_terminal_shows_what_is_done_and_what_is_waited_for(tmp_path: Path, verbose: str) -> None:
    master, terminal = pty.openpty()
    lines = "TASK [common : Install] ***\nok: [n1]\nFAILED - RETRYING: [ctl]: Wait for it (3 retries left).\n"
    with subprocess.Popen(
        ["bash", "-c", f"(printf %b '{lines}'; sleep 1.2) | {PROGRAM} --log {tmp_path}/log title"],
        stdout=terminal,
        env=os.environ | {"ICTX_VERBOSE": verbose, "COLUMNS": "100"},
    ) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # the terminal's other end is closed
                break
            if not part:
                break
            shown += part
    os.close(master)
    assert process.returncode == 0
    text = shown.decode()
    assert ("title  waiting on ctl: Wait for it" in text) is not bool(verbose)
    assert ("ok: [n1]" in text) is bool(verbose)
    assert "ok: [n1]" in (tmp_path / "log").read_text()


def test_an_unreachable_host_is_named() -> None:
    found = progress.failure(
        ["TASK [Gather facts] ***", "fatal: [n2]: UNREACHABLE! =>", "    changed: false", "    msg: 'no route'"]
    )
    assert found == ("n2", "Gather facts", ["changed: false", "msg: 'no route'"])
