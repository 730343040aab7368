"""The command line of whole-model benchmarks: `ictx bench decode|train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """
examples:
  ictx bench decode --config ictx-1b-128k --context 131072 --memory-gb 8
  ictx bench decode --config ictx-1b --context 1048576 --cache-dtype int8 --memory-gb 24 --out decode.csv
  ictx bench decode --config ictx-1b-128k --context 131072 --skip-prefill
"""
TRAIN_EXAMPLES = """
examples:
  ictx bench train --config ictx-1b --seq 32768 --ranks 2
  ictx bench train --config ictx-1b --seq 32768 --ranks 2 --recompute none selective full --compile --peer
  ictx bench train --config ictx-1b --seq 32768 --ranks 4 --recompute selective --layers 8 --out train.json
"""


def register(areas: Any) -> None:
    """Adds `bench` to the areas of the command line."""
    commands = areas.add_parser("bench", help="whole-model benchmarks").add_subparsers(metavar="COMMAND", required=True)
    decode = commands.add_parser(
        "decode",
        help="decode with random weights on this GPU; time of a token beside its floor",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    decode.add_argument("--config", required=True, help="name of a shipped configuration, or a YAML file")
    decode.add_argument("--context", type=int, metavar="N", help="cached tokens at the end (the model's longest)")
    decode.add_argument("--new-tokens", type=int, default=128, metavar="N", help="tokens that are decoded (128)")
    decode.add_argument(
        "--cache-dtype", choices=("bfloat16", "int8", "fp8"), default="bfloat16", help="dtype of latents (bfloat16)"
    )
    decode.add_argument(
        "--memory-gb", type=float, metavar="GB", help="most memory, 10^9 bytes, CUDA's context included"
    )
    decode.add_argument("--chunk-size", type=int, default=8192, metavar="N", help="tokens of a prefill step (8192)")
    decode.add_argument("--skip-prefill", action="store_true", help="fill the cache with random rows instead")
    decode.add_argument(
        "--out", type=Path, metavar="FILE", help="save the row: .json, or .csv, which rows are added to"
    )
    decode.set_defaults(run=run_decode)
    train = commands.add_parser(
        "train",
        help="training steps on random tokens: rate, utilisation, memory",
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("--config", required=True, help="name of a shipped configuration, or a YAML file")
    train.add_argument("--seq", type=int, required=True, metavar="N", help="tokens of a window")
    train.add_argument("--ranks", type=int, default=1, metavar="N", help="GPUs of this machine; processes without (1)")
    train.add_argument("--batch", type=int, default=1, metavar="N", help="windows of a rank and step (1)")
    train.add_argument("--steps", type=int, default=10, metavar="N", help="steps that are timed (10)")
    train.add_argument(
        "--recompute", nargs="+", choices=("none", "selective", "full"), default=["selective"],
        help="what the backward computes again; several are measured one after the other (selective)",
    )  # fmt: skip
    train.add_argument("--layers", type=int, metavar="N", help="layers that compute again (all)")
    train.add_argument("--compile", action="store_true", help="compile each layer, ours and the peer's")
    train.add_argument("--peer", action="store_true", help="measure transformers with the same sizes beside")
    train.add_argument("--out", type=Path, metavar="FILE", help="save the rows as JSON")
    train.set_defaults(run=run_train)


def run_decode(arguments: argparse.Namespace) -> int:
    """`ictx bench decode`."""
    from ictx.bench.decode import Case, measure
    from ictx.bench.report import lines, save, values
    from ictx.errors import UserError
    from ictx.model import ModelConfig

    config = ModelConfig.named(arguments.config)
    if arguments.memory_gb is not None and not arguments.memory_gb > 0:
        raise UserError(f"--memory-gb is {arguments.memory_gb}: expected more than 0")
    case = Case(
        config,
        config.max_position_embeddings if arguments.context is None else arguments.context,
        arguments.new_tokens,
        None if arguments.cache_dtype == "bfloat16" else arguments.cache_dtype,
        None if arguments.memory_gb is None else arguments.memory_gb * 1e9,
        arguments.chunk_size,
        not arguments.skip_prefill,
    )
    found = measure(case)
    row = values(Path(arguments.config).stem, case, found)
    print("\n".join(lines(row, found)))
    if arguments.out:
        save(row, arguments.out)
    return 0


def run_train(arguments: argparse.Namespace) -> int:
    """`ictx bench train`."""
    import json
    from dataclasses import asdict

    from ictx.bench.train import Case, run
    from ictx.bench.train_report import lines, projection
    from ictx.model import ModelConfig

    config = ModelConfig.named(arguments.config)
    case = (config, arguments.seq, arguments.batch)
    rest = (arguments.layers, arguments.compile, arguments.steps)
    cases = [Case(*case, mode, *rest) for mode in arguments.recompute]
    if arguments.peer:
        cases.append(Case(*case, "full", None, arguments.compile, arguments.steps, "transformers"))
    rows = run(cases, arguments.ranks)
    print("\n".join([*lines(rows), *projection(cases[0], rows[0])]))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", "utf-8")
    return 0
