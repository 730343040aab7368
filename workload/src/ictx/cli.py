"""The command line: `ictx data`, `ictx train`, `ictx pull`, `ictx promote`, and what other modules add."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from ictx import __version__, model_cli
from ictx.bench.cli import register as register_bench
from ictx.errors import UserError
from ictx.kernels.cli import register as register_kernels

PREPARE_EXAMPLES = """
The folder that holds the prepared corpus is printed last. Its name follows the text and the settings, so what is there
already is not made again.

examples:
  ictx data prepare --config pretrain/tiny.yaml --corpus /usr/lib/python3 /usr/share/doc --out /shared/data
  ictx data prepare --config pretrain/tiny.yaml --corpus notes/ --out data --set data.min_bytes=100000
  ictx data prepare --config pretrain/tiny.yaml --corpus pages.jsonl books.parquet --out data --set data.text_field=body
  ictx data prepare --config pretrain/tiny.yaml --corpus hf=HuggingFaceFW/fineweb-edu,sample-10BT --out /shared/data
"""
PRETRAIN_EXAMPLES = """
A run goes on from the newest checkpoint in run.dir. SIGTERM saves a checkpoint and ends with status 75.

examples:
  torchrun --nproc-per-node 2 -m ictx train pretrain --config pretrain/tiny.yaml \\
      --set run.dir=runs/1 --set data.dir=data/0123456789abcdef
  ictx train pretrain --config pretrain/tiny.yaml --set run.dir=runs/2 --set data.dir=data/… --set train.steps=20
"""
PULL_EXAMPLES = """
The server, name and password are MLflow's: MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD. The
folder appears complete and verified, or not at all; a pull that was interrupted goes on where it was.

examples:
  ictx pull models:/ictx-tiny@champion --to /models/ictx-tiny/champion
  ictx pull models:/ictx-tiny/3 --to /models/ictx-tiny/3
  ictx pull models:/ictx-tiny@champion --to /models/ictx-tiny/champion --promoted    # as the server does
"""
PROMOTE_EXAMPLES = """
The version's files are compared with the checksums that the job logged, and the checksums are recorded where only
promoters (ictx_promoters in the inventory) may write: a file that changes afterwards is not served.

examples:
  ictx promote 3 --alias champion
  ictx promote candidate --alias champion --model ictx-tiny    # the version that another alias stands for
"""


def parser() -> argparse.ArgumentParser:
    """Returns the command line's grammar."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="ictx", description="Long-context language models: data, training, export.")
    top.add_argument("--version", action="version", version=f"ictx {__version__}")
    areas = top.add_subparsers(metavar="AREA", required=True)
    settings = argparse.ArgumentParser(add_help=False)
    settings.add_argument("--config", required=True, help="YAML file, here or below the shipped configs")
    settings.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="replace a setting")

    data = areas.add_parser("data", help="corpora").add_subparsers(metavar="COMMAND", required=True)
    prepare = data.add_parser(
        "prepare",
        parents=[settings],
        help="train the tokenizer on a corpus and write its tokens",
        epilog=PREPARE_EXAMPLES,
        formatter_class=raw,
    )
    prepare.add_argument(
        "--corpus",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help="files and folders (text, gzipped or not; .jsonl; .parquet), and hf=NAME[,CONFIG[,SPLIT]]: a data set of "
        "the Hugging Face Hub, or a folder that `datasets` reads",
    )
    prepare.add_argument("--out", type=Path, required=True, help="folder below which the prepared corpus is put")
    prepare.add_argument("--link", type=Path, help="symbolic link to make to the prepared corpus")
    prepare.set_defaults(run=run_prepare)
    verify = data.add_parser("verify", help="read a prepared corpus and compare it with its checksums")
    verify.add_argument("dir", type=Path, metavar="DIR", help="what `ictx data prepare` printed")
    verify.set_defaults(run=run_verify)

    train = areas.add_parser("train", help="training").add_subparsers(metavar="COMMAND", required=True)
    pretrain = train.add_parser(
        "pretrain",
        parents=[settings],
        help="train a model from the start, export and register it",
        epilog=PRETRAIN_EXAMPLES,
        formatter_class=raw,
    )
    pretrain.set_defaults(run=run_pretrain)

    pull = areas.add_parser(
        "pull", help="fetch a registered model and verify it", epilog=PULL_EXAMPLES, formatter_class=raw
    )
    pull.add_argument("uri", help="models:/<name>@<alias> or models:/<name>/<version>")
    pull.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where its files go")
    pull.add_argument(
        "--promoted",
        action="store_true",
        default=os.environ.get("ICTX_PROMOTED_ONLY") == "true",
        help="refuse a version that no promoter verified (also: ICTX_PROMOTED_ONLY=true)",
    )
    pull.set_defaults(run=run_pull)

    promote = areas.add_parser(
        "promote",
        help="verify a registered version and point an alias to it",
        epilog=PROMOTE_EXAMPLES,
        formatter_class=raw,
    )
    promote.add_argument("version", help="number, or an alias that stands for it")
    promote.add_argument("--alias", required=True, help="alias that is to stand for it, such as champion")
    promote.add_argument("--model", default="", help="registered model; needed where there are several")
    promote.set_defaults(run=run_promote)

    model_cli.register(areas)
    register_kernels(areas, drive_models)
    register_bench(areas)
    return top


def drive_models(target: int) -> None:
    """Runs on the meta device what the shipped models launch on a GPU of a compute capability."""
    from ictx.infer.launches import drive

    drive(target)


def run_prepare(arguments: argparse.Namespace) -> int:
    """`ictx data prepare`."""
    from ictx.data.prepare import prepare
    from ictx.train.config import load

    # A job that is told to stop tidies up like one that fails.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # The whole configuration is read: what is wrong in it shows before the corpus is read, not after.
    directory = prepare(arguments.corpus, arguments.out, load(arguments.config, arguments.set).data)
    if arguments.link:
        draft = arguments.link.with_name(f"{arguments.link.name}.part")
        draft.unlink(missing_ok=True)
        draft.symlink_to(directory.resolve())
        draft.replace(arguments.link)
    print(directory)
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """`ictx data verify`."""
    from ictx.data.shards import verify

    meta = verify(arguments.dir)
    print(
        f"{arguments.dir} is intact: {meta['train_tokens']:,} training, {meta['validation_tokens']:,} validation tokens"
    )
    return 0


def run_pretrain(arguments: argparse.Namespace) -> int:
    """`ictx train pretrain`."""
    # torch takes seconds to import: only what trains waits for it.
    from ictx.train.config import load
    from ictx.train.pretrain import main as pretrain

    status = told(lambda: pretrain(load(arguments.config, arguments.set)))
    # Threads of torch outlive the process group; one that then asks for the interpreter while it shuts down aborts the
    # process, and torchrun takes that for a failure of the whole job. Everything is written: leave at once.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_pull(arguments: argparse.Namespace) -> int:
    """`ictx pull`."""
    from ictx.registry import ModelRef, explained, new_client
    from ictx.serve.pull import pull

    with explained():
        pull(new_client(), ModelRef.parse(arguments.uri), arguments.to, arguments.promoted)
    return 0


def run_promote(arguments: argparse.Namespace) -> int:
    """`ictx promote`."""
    from ictx.registry import explained, new_client
    from ictx.serve.promote import promote

    with explained():
        print(promote(new_client(), arguments.version, arguments.alias, arguments.model))
    return 0


def told(command: Callable[[], int]) -> int:
    """Returns the command's status; a UserError becomes one line and status 2."""
    try:
        return command()
    except UserError as error:
        print(f"ictx: {error}", file=sys.stderr)
    except OSError as error:
        # A file that is missing, not permitted, …: the file is what matters, not where we met it.
        if error.filename is None:
            raise
        print(f"ictx: {error.filename}: {error.strerror}", file=sys.stderr)
    return 2


def main() -> int:
    """Runs the command line."""
    arguments = parser().parse_args()
    try:
        status = told(lambda: int(arguments.run(arguments)))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has seen enough (`ictx … | head`). What is left must not be flushed at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status
