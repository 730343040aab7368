"""The command line: `ictx data prepare|verify`."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ictx.errors import UserError
from ictx.settings import build, command_line, config_path, load_yaml, override

if TYPE_CHECKING:
    from ictx.data.config import DataConfig

PREPARE_EXAMPLES = """
Prints the path of the prepared corpus last. Its name is a hash of text and settings, so that an existing corpus is not
prepared again.

examples:
  ictx data prepare --config pretrain/tiny.yaml --corpus /usr/lib/python3 /usr/share/doc --out /shared/data
  ictx data prepare --config pretrain/tiny.yaml --corpus notes/ --out data --set data.min_bytes=100000
  ictx data prepare --config pretrain/tiny.yaml --corpus pages.jsonl books.parquet --out data --set data.text_field=body
  ictx data prepare --config pretrain/tiny.yaml --corpus hf=HuggingFaceFW/fineweb-edu,sample-10BT --out /shared/data
  ictx data prepare --config extend/tiny.yaml --corpus long/ --out data --set init=models:/ictx-tiny@candidate \\
      --set run.dir=runs/3    # with the tokenizer of that model
  ictx data prepare --config sft/tiny.yaml --corpus stdlib --out /shared/data
  ictx data prepare --config sft/ictx-1b.yaml --corpus chats.jsonl alpaca.json hf=trl-lib/Capybara --out data

A configuration with data.kind sft or dpo prepares conversations, or prompts with a chosen and a rejected answer, from
JSON lines, JSON lists and Parquet with messages, ShareGPT's conversations, Alpaca's instructions, or TRL's prompt,
completion, chosen and rejected; or from `stdlib`, the documented functions of Python's standard library.
"""


def register(areas: Any) -> None:
    """Adds `data` to the areas of the command line."""
    data = areas.add_parser("data", help="prepare and verify training data").add_subparsers(
        metavar="COMMAND", required=True
    )
    prepare = data.add_parser(
        "prepare",
        parents=[command_line()],
        help="tokenize a corpus or conversations",
        epilog=PREPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    prepare.add_argument(
        "--corpus",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help="files, folders and pipes (text, .jsonl, .parquet; compressed or not), and hf=NAME[,CONFIG[,SPLIT]]: a "
        "data set of the Hugging Face Hub, or a folder for `datasets`; for conversations also `stdlib`",
    )
    prepare.add_argument("--out", type=Path, required=True, help="parent folder of the prepared corpus")
    prepare.add_argument("--link", type=Path, help="create or update this symbolic link to the prepared corpus")
    prepare.set_defaults(run=run_prepare)
    verify = data.add_parser(
        "verify",
        help="verify the checksums of a prepared corpus",
        epilog="example:\n  ictx data verify data/now",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("dir", type=Path, metavar="DIR", help="prepared corpus, as printed by `ictx data prepare`")
    verify.set_defaults(run=run_verify)


def run_prepare(arguments: argparse.Namespace) -> int:
    """Runs `ictx data prepare`."""
    # Raises SystemExit, so that a job that is signalled to stop cleans up like one that fails.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    directory = _prepared(arguments)
    if arguments.link:
        draft = arguments.link.with_name(f"{arguments.link.name}.part")
        draft.unlink(missing_ok=True)
        draft.symlink_to(directory.resolve())
        draft.replace(arguments.link)
    print(directory)
    return 0


def _prepared(arguments: argparse.Namespace) -> Path:
    """Prepares a corpus or conversations, depending on the configuration."""
    # Applies only data settings: `model` may still be a name here, which has no keys to override.
    own = [each for each in arguments.set if re.match(r"data\b", each)]
    data = override(load_yaml(config_path(arguments.config)), own).get("data")
    if isinstance(data, dict) and data.get("kind"):
        from ictx.data.chat import prepare as chat
        from ictx.data.chat.config import ChatDataConfig

        return chat.prepare(arguments.corpus, arguments.out, build(ChatDataConfig, data, "data."))
    from ictx.data.prepare import prepare
    from ictx.train.config import PretrainConfig, read

    # Reads the whole configuration, so that errors in it are reported before the corpus is read.
    content = read(arguments.config, arguments.set)
    config = _of_parent(content) if content.get("init") else build(PretrainConfig, content).data
    return prepare(arguments.corpus, arguments.out, config)


def _of_parent(content: dict[str, Any]) -> DataConfig:
    """Returns the corpus settings of a stage with a parent; data.tokenizer defaults to the parent's.

    Downloads the parent to run.dir, where the stage uses it. Raises UserError.
    """
    from ictx.data.config import DataConfig
    from ictx.registry import explained
    from ictx.train.config import ExtendConfig, RunConfig
    from ictx.train.extend import Extension
    from ictx.train.init import take

    run = build(RunConfig, content.get("run", {}), "run.")
    if run.dir is None:
        raise UserError("run.dir is not set: add --set run.dir=FOLDER (the model of init is kept there)")
    run.dir.mkdir(parents=True, exist_ok=True)
    with explained():
        parent = take(content["init"], run.dir, run.tracking_patience)
    if "train" in content:
        config = build(ExtendConfig, Extension.completed(content, parent)).data
    else:  # an evaluation
        config = build(DataConfig, {"vocab_size": parent.config.vocab_size, **content.get("data", {})}, "data.")
    return replace(config, tokenizer=config.tokenizer or parent.directory)


def run_verify(arguments: argparse.Namespace) -> int:
    """Runs `ictx data verify`."""
    from ictx.data.contents import verify

    meta = verify(arguments.dir)
    if "kind" in meta:
        counts = " and ".join(f"{entry['rows']:,} {split} rows" for split, entry in meta["splits"].items())
    else:
        counts = f"{meta['train_tokens']:,} training, {meta['validation_tokens']:,} validation tokens"
    print(f"{arguments.dir} is intact: {counts}")
    return 0
