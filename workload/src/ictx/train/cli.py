"""The command line: `ictx train`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from ictx.errors import exit_status
from ictx.settings import command_line

PRETRAIN_EXAMPLES = """
A run resumes from the newest checkpoint in run.dir. On SIGTERM it saves a checkpoint and exits with status 75.

examples:
  torchrun --nproc-per-node 2 -m ictx train pretrain --config pretrain/tiny.yaml \\
      --set run.dir=runs/1 --set data.dir=data/0123456789abcdef
  ictx train pretrain --config pretrain/tiny.yaml --set run.dir=runs/2 --set data.dir=data/… --set train.steps=20
"""

EXTEND_EXAMPLES = """
The parent's version is resolved once, verified and kept in run.dir/init, so that a changed alias does not affect the
run. model.yarn sets the context extension; the other model settings are the parent's.

examples:
  ictx train extend --config extend/tiny.yaml --set init=models:/ictx-tiny@candidate \\
      --set run.dir=runs/3 --set data.dir=data/…
  ictx train extend --config extend/tiny.yaml --set init=run:/shared/runs/me/17 --set run.dir=runs/4 \\
      --set data.dir=data/… --set model.yarn.factor=4 --set train.sequence_length=512
"""

SFT_EXAMPLES = """
Prepare the data with `ictx data prepare` and the same configuration. Only tokens of answers, which the chat template
marks with {% generation %}, contribute to the loss. A window packs several conversations without attention between
them. With train.lora, run.dir/export contains the merged model and run.dir/adapter the adapter in PEFT's format.

examples:
  ictx data prepare --config sft/tiny.yaml --corpus stdlib --out data --link data/sft
  ictx train sft --config sft/tiny.yaml --set init=models:/ictx-tiny@candidate --set run.dir=runs/5 \\
      --set data.dir=data/sft
  ictx train sft --config sft/ictx-1b.yaml --set init=run:/shared/runs/me/18 --set run.dir=runs/6 \\
      --set data.dir=data/sft --set train.lora='{rank: 16, alpha: 32}'
"""

DPO_EXAMPLES = """
Set data.dir to the path that `ictx data prepare --config dpo/…` printed. Up to 32,768 tokens TRL trains (pip install
trl), beyond that ictx's own loop; dpo.engine overrides this. Rewards are relative to the parent, or to dpo.reference.
train.lora works as in `ictx train sft`.

examples:
  ictx train dpo --config dpo/tiny.yaml --set init=models:/ictx-tiny@candidate \\
      --set run.dir=runs/5 --set data.dir=data/…
  torchrun --nproc-per-node 4 -m ictx train dpo --config dpo/ictx-1b.yaml --set init=run:/shared/runs/me/18 \\
      --set run.dir=runs/6 --set data.dir=data/… --set dpo.loss=ipo --set dpo.reference=models:/ictx-1b/7
  torchrun --nproc-per-node 4 -m ictx train dpo --config dpo/ictx-1b.yaml --set init=models:/ictx-1b/8 \\
      --set run.dir=runs/7 --set data.dir=data/… --set train.sequence_length=131072 --set parallel.cp=4
"""


def register(areas: Any) -> None:
    """Adds `train` to the areas of the command line."""
    train = areas.add_parser("train", help="train a model").add_subparsers(metavar="COMMAND", required=True)
    _add(
        train, "pretrain", run_pretrain, "train a model from random weights, export and register it", PRETRAIN_EXAMPLES
    )
    _add(train, "extend", run_extend, "extend a model's context window", EXTEND_EXAMPLES)
    _add(train, "sft", run_sft, "fine-tune a model on conversations (SFT)", SFT_EXAMPLES)
    _add(train, "dpo", run_dpo, "align a model with preference pairs (DPO)", DPO_EXAMPLES)


def _add(train: Any, name: str, run: Callable[[argparse.Namespace], int], about: str, examples: str) -> None:
    """Adds a stage's command."""
    stage = train.add_parser(
        name,
        parents=[command_line()],
        help=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stage.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help="trace STEPS steps to run.dir/profile (sets train.profile)",
    )
    stage.set_defaults(run=run)


# Stages are imported in their commands, because importing torch takes seconds.
def run_pretrain(arguments: argparse.Namespace) -> int:
    """Runs `ictx train pretrain`."""
    from ictx.train.pretrain import start

    return _train(arguments, start)


def run_extend(arguments: argparse.Namespace) -> int:
    """Runs `ictx train extend`."""
    from ictx.train.child import main
    from ictx.train.extend import Extension

    return _train(arguments, lambda content: main(Extension, content))


def run_sft(arguments: argparse.Namespace) -> int:
    """Runs `ictx train sft`."""
    from ictx.train.child import main
    from ictx.train.sft import Tuning

    return _train(arguments, lambda content: main(Tuning, content))


def run_dpo(arguments: argparse.Namespace) -> int:
    """Runs `ictx train dpo`."""
    from ictx.train.child import main
    from ictx.train.dpo import Preference

    return _train(arguments, lambda content: main(Preference, content))


def _train(arguments: argparse.Namespace, stage: Callable[[dict[str, Any]], int]) -> int:
    """Runs a stage with its settings as plain values, and exits the process."""
    from ictx.train.config import read

    profile = [f"train.profile={arguments.profile}"] if arguments.profile else []
    status = exit_status(lambda: stage(read(arguments.config, arguments.set + profile)))
    # torch's threads outlive the process group. One that needs the interpreter while it shuts down aborts the process,
    # and torchrun would report a failed job. Everything is written by now: exit immediately.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
