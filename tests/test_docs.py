"""Commands in the documentation exist: targets, playbooks, scripts, programs of nodes, and options of `ictx`."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import ROOT

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("workload/*.md")])
OTHERS = {"make deb", "ictx computes decoding: …", "ictx computes prefill: …"}
"""A target of SLURM's sources, and lines of vLLM's log."""
PLAYBOOK = re.compile(r"(site|playbooks/[\w-]+)\.yml")


def code(page: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines of a page's code blocks, and commands within its text, with their numbers."""
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield number, line.strip()
        else:
            yield from ((number, text) for text in re.findall(r"`([^`]+ [^`]+)`", line))


def words(line: str) -> list[str]:
    """Returns the words of a command, without its comment; none if it is not shell syntax."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return []


COMMANDS = [
    pytest.param(text, id=f"{page.relative_to(ROOT)}:{number}:{text[:40]}")
    for page in PAGES
    for number, text in code(page)
    if words(text) and text not in OTHERS
]


def grammar() -> argparse.ArgumentParser:
    """Returns the argument parser of `ictx`, which needs none of the workload's packages."""
    sys.path.insert(0, str(ROOT / "workload/src"))
    try:
        from ictx.cli import parser
    finally:
        sys.path.pop(0)
    return parser()


def below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Returns the commands below a command."""
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {name: parser for action in actions for name, parser in action.choices.items()}


def unknown_of_ictx(arguments: list[str]) -> list[str]:
    """Returns the commands and options that `ictx` does not have."""
    parser = grammar()
    while arguments and (commands := below(parser)):
        name, *arguments = arguments
        if name.startswith("-"):
            break
        if name not in commands:
            # A name in upper case is a placeholder.
            return [] if name.isupper() or name == "…" or "|" in name else [name]
        parser = commands[name]
    options = {option for action in parser._actions for option in action.option_strings}
    return [
        word
        for word in (word.strip("[]").split("=")[0] for word in arguments)
        if re.match("--[a-z]", word) and word not in options
    ]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_documented_command_exists(line: str) -> None:
    for part in re.split(r"&&|\|\||;|\|", line):
        check(words(part))


def check(command: list[str]) -> None:
    """Fails if a command names something that is not in the repository."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if command[:1] == ["make"] and len(command) > 1 and re.fullmatch(r"[a-z-]+", command[1]):
        assert command[1] in targets
    if command and Path(command[0]).name == "ansible-playbook":
        for word in command[1:]:
            assert not PLAYBOOK.fullmatch(word) or (ROOT / word).exists(), word
    for word in command[:2]:
        if re.fullmatch(r"scripts/[a-z-]+", word):
            assert (ROOT / word).exists(), word
    for position, word in enumerate(command):
        if match := re.fullmatch(r"/opt/ictx/bin/([a-z-]+)", word):
            assert [*ROOT.glob(f"roles/*/files/{match[1]}"), *ROOT.glob(f"roles/*/templates/{match[1]}*.j2")], word
        if word in ("ictx", "/opt/ictx/bin/ictx", ".venv-workload/bin/ictx") and position in (0, 1):
            assert unknown_of_ictx(command[position + 1 :]) == []
        if re.fullmatch(r"charts/[\w./-]+", word):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize(
    ("arguments", "unknown"),
    [
        ("train sft --config x --set a=b", []),
        ("train sfx --config x", ["sfx"]),
        ("kernels bench --nothing 3", ["--nothing"]),
    ],
)
def test_what_ictx_does_not_have_is_found(arguments: str, unknown: list[str]) -> None:
    assert unknown_of_ictx(arguments.split()) == unknown
