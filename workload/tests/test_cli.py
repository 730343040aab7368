"""The command line's help: examples of each command, and exit statuses."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from ictx.cli import parser


def commands(grammar: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yields all commands below a parser, without those that only group others."""
    below = [action for action in grammar._actions if isinstance(action, argparse._SubParsersAction)]
    if not any(action.required for action in below):
        yield grammar
    for action in below:
        for command in dict.fromkeys(action.choices.values()):
            yield from commands(command)


@pytest.mark.parametrize("command", [pytest.param(each, id=each.prog) for each in commands(parser())])
def test_a_command_has_an_example_of_its_own(command: argparse.ArgumentParser) -> None:
    _, _, examples = command.format_help().partition("\nexample")
    assert command.prog in examples


def test_the_help_has_the_exit_statuses() -> None:
    assert "\nexit status:\n" in parser().format_help()
