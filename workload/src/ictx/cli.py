"""The command line: what each room of the package registers."""

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
"""In the order of the help."""
SETTINGS_OF_RUNS = {"train": "--set", "sweep": "--train"}
"""Options that take settings of runs of training, by area."""


EPILOG = """
exit status:
  0        success
  1        a check failed (ictx doctor, ictx kernels build), or an unexpected error, with its traceback
  2        wrong arguments, settings or input: one line names the thing and the remedy
  3        ictx promote: the policy rejects the version
  75       a checkpoint is saved; start the same command again (SIGTERM, time limit, preemption)
  128 + N  ended by signal N

examples:
  ictx model describe ictx-1b
  ictx train pretrain --config pretrain/tiny.yaml --set data.dir=data/now --set run.dir=runs/1
  ictx train pretrain --help
"""

COMPLETION = """
It completes commands, options, choices and files, without a start of Python each time.

examples:
  source <(ictx completion bash)                              # in this shell
  ictx completion bash >~/.local/share/bash-completion/completions/ictx
  ictx completion zsh >"${fpath[1]}/_ictx"                    # then a new shell
"""


class Version(argparse.Action):
    """Prints what runs; looks it up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(describe())
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Returns the command line's grammar."""
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
        help="print what completes commands in a shell",
        epilog=COMPLETION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=["bash", "zsh"])
    completion.set_defaults(run=complete)
    return top


def actions(grammar: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yields the options and arguments of a command and of all below it."""
    for action in grammar._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from actions(below)


def complete(arguments: argparse.Namespace) -> int:
    """`ictx completion`: raises UserError where the package that writes the script is missing."""
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
    """Returns a command's words with what a W&B agent's `${args}` adds (`--SECTION.KEY=VALUE`) as settings."""
    option = SETTINGS_OF_RUNS.get(words[0]) if words else None
    return [f"{option}={word[2:]}" if option and re.match(r"--\w+(\.\w+)+=", word) else word for word in words]


def main() -> int:
    """Runs the command line."""
    arguments = parser().parse_args(with_agents_settings(sys.argv[1:]))
    # Paths need not be UTF-8: whoever reads them gets the bytes that they have.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        status = exit_status(lambda: int(arguments.run(arguments)))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has seen enough (`ictx … | head`). What is left must not be flushed at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status
