"""The `ictx` command line: collects the commands that the subpackages register."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ictx.bench import cli as bench
from ictx.data import cli as data
from ictx.doctor import cli as doctor
from ictx.errors import UserError, exit_status
from ictx.evaluate import cli as evaluate
from ictx.infer import cli as infer
from ictx.kernels import cli as kernels
from ictx.model import cli as model
from ictx.serve import cli as serve
from ictx.sweep import cli as sweep
from ictx.train import cli as train
from ictx.version import describe

ROOMS = (data, train, sweep, evaluate, serve, model, infer, kernels, bench, doctor)
"""Subpackages with commands, in the order of the help."""
SETTINGS_OF_RUNS = {"train": "--set", "sweep": "--train"}
"""The option of each area that overrides settings of training runs."""


EPILOG = """
exit status:
  0        success
  1        a check failed (ictx doctor, ictx kernels build), or an unexpected error (prints a traceback)
  2        invalid arguments, settings or input (prints one line with the cause and the remedy)
  3        ictx promote: the policy rejects the version
  75       interrupted after saving a checkpoint (SIGTERM, time limit, preemption): run the same command again
  128 + N  terminated by signal N

examples:
  ictx model describe ictx-1b
  ictx train pretrain --config pretrain/tiny.yaml --set data.dir=data/now --set run.dir=runs/1
  ictx train pretrain --help
"""

COMPLETION = """
Completes commands, options, choices and files without starting Python each time.

examples:
  source <(ictx completion bash)                              # in this shell
  ictx completion bash >~/.local/share/bash-completion/completions/ictx
  ictx completion zsh >"${fpath[1]}/_ictx"                    # then start a new shell
"""


class Version(argparse.Action):
    """Prints the version; collects it only when requested."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(describe())
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Returns the parser with all commands."""
    top = argparse.ArgumentParser(
        prog="ictx",
        description="Long-context language models: data, training, evaluation, export, serving.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action=Version, nargs=0, help="print release, commit, image, lock files and packages")
    areas = top.add_subparsers(metavar="AREA", required=True)
    for room in ROOMS:
        room.register(areas)
    completion = areas.add_parser(
        "completion",
        help="print a shell's completion script",
        epilog=COMPLETION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=["bash", "zsh"])
    completion.set_defaults(run=complete)
    return top


def actions(grammar: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yields the options and arguments of a command and of all its subcommands."""
    for action in grammar._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from actions(below)


def complete(arguments: argparse.Namespace) -> int:
    """Runs `ictx completion`. Raises UserError if shtab is not installed."""
    try:
        import shtab
    except ImportError as error:
        raise UserError("completion needs the package shtab, which is not installed: pip install shtab") from error

    grammar = parser()
    for action in actions(grammar):
        if action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(grammar, shell=arguments.shell))
    return 0


def with_agents_settings(words: Sequence[str]) -> list[str]:
    """Returns the arguments with those of a W&B agent's `${args}` (`--SECTION.KEY=VALUE`) turned into settings."""
    option = SETTINGS_OF_RUNS.get(words[0]) if words else None
    return [f"{option}={word[2:]}" if option and re.match(r"--\w+(\.\w+)+=", word) else word for word in words]


def main() -> int:
    """Runs the command line; returns the exit status."""
    arguments = parser().parse_args(with_agents_settings(sys.argv[1:]))
    # Paths need not be UTF-8: print their bytes unchanged.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        status = exit_status(lambda: int(arguments.run(arguments)))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe (`ictx … | head`): the interpreter must not flush the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status
