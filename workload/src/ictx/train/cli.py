"""The command line of training: `ictx train pretrain`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from ictx.errors import exit_status
from ictx.settings import command_line

PRETRAIN_EXAMPLES = """
A run goes on from the newest checkpoint in run.dir. SIGTERM saves a checkpoint and ends with status 75.

examples:
  torchrun --nproc-per-node 2 -m ictx train pretrain --config pretrain/tiny.yaml \\
      --set run.dir=runs/1 --set data.dir=data/0123456789abcdef
  ictx train pretrain --config pretrain/tiny.yaml --set run.dir=runs/2 --set data.dir=data/… --set train.steps=20
"""

EXTEND_EXAMPLES = """
The parent's version is looked up once, verified and kept in run.dir/init: an alias that moves meanwhile changes
nothing. model.yarn sets how far positions are stretched; everything else of the model is the parent's.

examples:
  ictx train extend --config extend/tiny.yaml --set init=models:/ictx-tiny@candidate \\
      --set run.dir=runs/3 --set data.dir=data/…
  ictx train extend --config extend/tiny.yaml --set init=run:/shared/runs/me/17 --set run.dir=runs/4 \\
      --set data.dir=data/… --set model.yarn.factor=4 --set train.sequence_length=512
"""

SFT_EXAMPLES = """
Data is what `ictx data prepare` makes with the same configuration. The loss is that of the answers alone, which the
chat template marks with {% generation %}; a window holds several conversations that do not see each other. With
train.lora small matrices are trained; run.dir/export has them merged, run.dir/adapter apart, as PEFT reads them.

examples:
  ictx data prepare --config sft/tiny.yaml --corpus stdlib --out data --link data/sft
  ictx train sft --config sft/tiny.yaml --set init=models:/ictx-tiny@candidate --set run.dir=runs/5 \\
      --set data.dir=data/sft
  ictx train sft --config sft/ictx-1b.yaml --set init=run:/shared/runs/me/18 --set run.dir=runs/6 \\
      --set data.dir=data/sft --set train.lora='{rank: 16, alpha: 32}'
"""

DPO_EXAMPLES = """
data.dir is what `ictx data prepare --config dpo/…` printed. Up to 32,768 tokens TRL trains (pip install trl), beyond
that our own loop does; dpo.engine chooses. Rewards are relative to the parent, or to dpo.reference. With train.lora
small matrices are trained, as in `ictx train sft`.

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
    train = areas.add_parser("train", help="training").add_subparsers(metavar="COMMAND", required=True)
    _add(train, "pretrain", run_pretrain, "train a model from the start, export and register it", PRETRAIN_EXAMPLES)
    _add(train, "extend", run_extend, "teach a trained model longer contexts", EXTEND_EXAMPLES)
    _add(train, "sft", run_sft, "teach a trained model the answers of conversations", SFT_EXAMPLES)
    _add(train, "dpo", run_dpo, "make preferred answers likelier than rejected ones", DPO_EXAMPLES)


def _add(train: Any, name: str, run: Callable[[argparse.Namespace], int], about: str, examples: str) -> None:
    """Adds a stage."""
    stage = train.add_parser(
        name,
        parents=[command_line()],
        help=about,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    stage.add_argument(
        "--profile", type=int, default=0, metavar="STEPS", help="trace so many steps to run.dir/profile (train.profile)"
    )
    stage.set_defaults(run=run)


# torch takes seconds to import: only what trains waits for it.
def run_pretrain(arguments: argparse.Namespace) -> int:
    """`ictx train pretrain`."""
    from ictx.train.pretrain import start

    return _train(arguments, start)


def run_extend(arguments: argparse.Namespace) -> int:
    """`ictx train extend`."""
    from ictx.train.child import main
    from ictx.train.extend import Extension

    return _train(arguments, lambda content: main(Extension, content))


def run_sft(arguments: argparse.Namespace) -> int:
    """`ictx train sft`."""
    from ictx.train.child import main
    from ictx.train.sft import Tuning

    return _train(arguments, lambda content: main(Tuning, content))


def run_dpo(arguments: argparse.Namespace) -> int:
    """`ictx train dpo`."""
    from ictx.train.child import main
    from ictx.train.dpo import Preference

    return _train(arguments, lambda content: main(Preference, content))


def _train(arguments: argparse.Namespace, stage: Callable[[dict[str, Any]], int]) -> int:
    """Runs a stage, which gets its settings as plain values, and ends the process."""
    from ictx.train.config import read

    profile = [f"train.profile={arguments.profile}"] if arguments.profile else []
    status = exit_status(lambda: stage(read(arguments.config, arguments.set + profile)))
    # Threads of torch outlive the process group; one that then requests the interpreter while it shuts down aborts the
    # process, and torchrun takes that for a failure of the whole job. Everything is written: leave at once.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
