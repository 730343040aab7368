"""The command line of training: `ictx train pretrain`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from ictx.errors import exit_status
from ictx.settings import build, command_line

PRETRAIN_EXAMPLES = """
A run goes on from the newest checkpoint in run.dir. SIGTERM saves a checkpoint and ends with status 75.

examples:
  torchrun --nproc-per-node 2 -m ictx train pretrain --config pretrain/tiny.yaml \\
      --set run.dir=runs/1 --set data.dir=data/0123456789abcdef
  ictx train pretrain --config pretrain/tiny.yaml --set run.dir=runs/2 --set data.dir=data/… --set train.steps=20
"""


def register(areas: Any) -> None:
    """Adds `train` to the areas of the command line."""
    train = areas.add_parser("train", help="training").add_subparsers(metavar="COMMAND", required=True)
    pretrain = train.add_parser(
        "pretrain",
        parents=[command_line()],
        help="train a model from the start, export and register it",
        epilog=PRETRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pretrain.add_argument(
        "--profile", type=int, default=0, metavar="STEPS", help="trace so many steps to run.dir/profile (train.profile)"
    )
    pretrain.set_defaults(run=run_pretrain)


def run_pretrain(arguments: argparse.Namespace) -> int:
    """`ictx train pretrain`."""
    # torch takes seconds to import: only what trains waits for it.
    from ictx.train.config import read
    from ictx.train.pretrain import Pretraining
    from ictx.train.run import main

    def train() -> int:
        profile = [f"train.profile={arguments.profile}"] if arguments.profile else []
        config = build(Pretraining.settings, read(arguments.config, arguments.set + profile))
        return main(Pretraining(config), config)

    status = exit_status(train)
    # Threads of torch outlive the process group; one that then asks for the interpreter while it shuts down aborts the
    # process, and torchrun takes that for a failure of the whole job. Everything is written: leave at once.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
