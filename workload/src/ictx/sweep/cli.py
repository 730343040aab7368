"""The command line: `ictx sweep`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from typing import Any

from ictx.errors import UserError
from ictx.sweep.config import SweepConfig, load

EXAMPLES = """
`ictx sweep CONFIG` starts the configuration's `parallel` workers on this machine and waits for them. `run` is a single
worker: start any number on any machines with the same folder. A trial that crashes or loses its worker resumes from its
last checkpoint. On SIGTERM a checkpoint is saved and the exit status is 75. `status` lists the trials, `best` prints
the best one. `trial` trains once with given settings: the command of a W&B agent, as in sweep/tiny-wandb.yaml.

examples:
  ictx sweep sweep/tiny.yaml --set dir=sweeps/1 --train data.dir=data/0123456789abcdef
  ictx sweep run sweep/tiny.yaml --set dir=sweeps/1 --train data.dir=data/0123456789abcdef
  ictx sweep best sweep/tiny.yaml --set dir=sweeps/1
  ictx sweep trial sweep/tiny.yaml --set dir=sweeps/1 --train data.dir=data/… optimizer.learning_rate=0.003
"""
ACTIONS = ("start", "run", "status", "best", "trial")


def register(areas: Any) -> None:
    """Adds `sweep` to the areas of the command line."""
    sweep = areas.add_parser(
        "sweep",
        help="search for the best settings of a training stage",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="ictx sweep [run|status|best|trial] CONFIG [--set KEY=VALUE] [--train SECTION.KEY=VALUE …]",
    )
    sweep.add_argument(
        "action", nargs="?", choices=ACTIONS, default="start", help="action (default: start all workers and wait)"
    )
    sweep.add_argument("config", metavar="CONFIG", help="YAML file: a path, or a name below the shipped configs")
    sweep.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the sweep"
    )
    sweep.add_argument(
        "--train",
        action="extend",
        nargs="*",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="further settings of every run",
    )
    sweep.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs `ictx sweep`."""
    action, config = arguments.action, load(arguments.config, arguments.set, arguments.train)
    if action == "start":
        given = [*(f"--set={each}" for each in arguments.set), *(f"--train={each}" for each in arguments.train)]
        return _start(config, [arguments.config, *given])
    if action == "trial":
        return _trial(config)
    # Optuna, MLflow and matplotlib take seconds to import.
    from ictx.sweep.study import Sweep

    if action == "run":
        from ictx.sweep.worker import Worker

        return Worker(Sweep(config)).work()
    from ictx.sweep.report import summary, table

    assert config.dir
    if not (config.dir / "journal").exists():
        raise UserError(f"{config.dir} is not a sweep: set --set dir=FOLDER to one that `ictx sweep` has started")
    sweep = Sweep(config, reading=True)
    if action == "status":
        print(table(sweep))
        return 0
    if not (best := sweep.best()):
        raise UserError(f"no trial of {config.name} has finished yet")
    print(summary(sweep, best))
    return 0


def _trial(config: SweepConfig) -> int:
    """Replaces this process by the training with an external agent's settings."""
    from ictx.sweep.report import Parent
    from ictx.sweep.study import Sweep
    from ictx.sweep.worker import training

    sweep = Sweep(config, reading=True)
    name = os.environ.get("WANDB_RUN_ID") or os.environ.get("SLURM_JOB_ID") or str(os.getpid())
    with sweep.exclusive():
        parent = Parent(sweep)
    command = training(config, sweep.folder / f"agent-{name}", {}, parent.run_id)
    sys.stdout.flush()
    os.execvp(command[0], command)


def _start(config: SweepConfig, arguments: list[str]) -> int:
    """Runs this machine's workers until they end; returns 0, or the first nonzero status."""
    shares = _shares(config.parallel)
    workers = [_worker(arguments, share) for share in shares]

    def stop(*_: Any) -> None:
        for worker in workers:
            worker.send_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    left, statuses = config.retries, []
    while workers:
        pid, raw = os.wait()
        number = next(number for number, worker in enumerate(workers) if worker.pid == pid)
        workers.pop(number).returncode = status = os.waitstatus_to_exitcode(raw)
        share = shares.pop(number)
        if status < 0 and left:
            print(f"a worker was killed by signal {-status}: starting another one", flush=True)
            left -= 1
            shares.append(share)
            workers.append(_worker(arguments, share))
        else:
            statuses.append(status)
    return next((status if status > 0 else 1 for status in statuses if status), 0)


def _worker(arguments: list[str], share: str | None) -> subprocess.Popen[bytes]:
    gpus = {} if share is None else {"CUDA_VISIBLE_DEVICES": share}
    return subprocess.Popen([sys.executable, "-m", "ictx", "sweep", "run", *arguments], env=os.environ | gpus)


def _shares(workers: int) -> list[str | None]:
    """Returns each worker's CUDA_VISIBLE_DEVICES; None without GPUs. Raises UserError for too few GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        import torch

        visible = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = [each for each in visible.split(",") if each]
    if not gpus:
        return [None] * workers
    if len(gpus) < workers:
        raise UserError(f"parallel is {workers}, but there are {len(gpus)} GPUs: --set parallel={len(gpus)}")
    return [",".join(gpus[number::workers]) for number in range(workers)]
