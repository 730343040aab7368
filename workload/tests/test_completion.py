"""`ictx completion` prints a shell script that completes commands, options, choices and files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ictx import cli

SHOW = '_shtab_ictx "$@"; printf "%s\\n" "${COMPREPLY[@]}"'


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Path:
    """The script for bash, as a file."""
    assert cli.complete(cli.parser().parse_args(["completion", "bash"])) == 0
    file = tmp_path / "ictx.bash"
    file.write_text(capsys.readouterr().out)
    return file


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ictx ke", {"kernels"}),
        ("ictx train ", {"pretrain", "extend", "sft", "dpo"}),
        ("ictx train sft --c", {"--config"}),
        ("ictx completion ", {"bash", "zsh"}),
        ("ictx eval perplexity --dtype b", {"bfloat16"}),
        ("ictx doctor --dir runs-of", {"runs-of-alice"}),
    ],
)
def test_bash_completes_commands_options_choices_and_files(script: Path, line: str, offered: set[str]) -> None:
    (script.parent / "runs-of-alice").mkdir()
    words = line.split(" ")
    quoted = " ".join(f"'{word}'" for word in words)
    # The variables that bash sets before it calls a completion.
    state = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; set -- ictx '{words[-1]}' '{words[-2]}'"
    command = f". {script}; complete -p ictx >/dev/null; {state}; {SHOW}"
    done = subprocess.run(["bash", "-c", command], cwd=script.parent, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    found = set(done.stdout.split())
    assert found - {"-h", "--help"} == offered


def test_zsh_gets_a_function_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.complete(cli.parser().parse_args(["completion", "zsh"])) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("#compdef ictx\n")
    assert "--recompute" in printed
