"""The command line of the data: `ictx data prepare|verify`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from ictx.settings import command_line

PREPARE_EXAMPLES = """
The folder that holds the prepared corpus is printed last. Its name follows the text and the settings, so what is there
already is not made again.

examples:
  ictx data prepare --config pretrain/tiny.yaml --corpus /usr/lib/python3 /usr/share/doc --out /shared/data
  ictx data prepare --config pretrain/tiny.yaml --corpus notes/ --out data --set data.min_bytes=100000
  ictx data prepare --config pretrain/tiny.yaml --corpus pages.jsonl books.parquet --out data --set data.text_field=body
  ictx data prepare --config pretrain/tiny.yaml --corpus hf=HuggingFaceFW/fineweb-edu,sample-10BT --out /shared/data
"""


def register(areas: Any) -> None:
    """Adds `data` to the areas of the command line."""
    data = areas.add_parser("data", help="corpora").add_subparsers(metavar="COMMAND", required=True)
    prepare = data.add_parser(
        "prepare",
        parents=[command_line()],
        help="train the tokenizer on a corpus and write its tokens",
        epilog=PREPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prepare.add_argument(
        "--corpus",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help="files, folders and pipes (text, .jsonl, .parquet; compressed or not), and hf=NAME[,CONFIG[,SPLIT]]: a "
        "data set of the Hugging Face Hub, or a folder that `datasets` reads",
    )
    prepare.add_argument("--out", type=Path, required=True, help="folder below which the prepared corpus is put")
    prepare.add_argument("--link", type=Path, help="symbolic link to make to the prepared corpus")
    prepare.set_defaults(run=run_prepare)
    verify = data.add_parser("verify", help="read a prepared corpus and compare it with its checksums")
    verify.add_argument("dir", type=Path, metavar="DIR", help="what `ictx data prepare` printed")
    verify.set_defaults(run=run_verify)


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
