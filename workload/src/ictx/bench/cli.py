"""The command line: `ictx bench decode|train|align|links`."""

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
  ictx bench train --config ictx-1b --seq 524288 --ranks 2 --cp 2 --offload --warm-up 0 --steps 1 --profile
  ictx bench train --config ictx-1b --seq 1048576 --ranks 8 --cp 8 --simulate --cap 78 --warm-up 1 --steps 1
  ictx bench train --config tiny --seq 4096 --ranks 2 --cp 2 --check 1 --dtype float32
"""

ALIGN_EXAMPLES = """
examples:
  ictx bench align --config ictx-1b --task dpo --seq 8192
  ictx bench align --config ictx-1b --task sft --seq 32768 --compile --out align.json
  ictx bench align --config ictx-1b --task dpo --seq 8192 --recompute full --only trl+ictx
  ictx bench align --config tiny --task dpo --seq 256 --only ictx trl+ictx
"""

LINKS_EXAMPLES = """
examples:
  torchrun --nproc-per-node 4 -m ictx bench links
  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-endpoint gpu1:29500 -m ictx bench links --out links.json
"""


def register(areas: Any) -> None:
    """Adds `bench` to the areas of the command line."""
    commands = areas.add_parser("bench", help="benchmark whole models and the network").add_subparsers(
        metavar="COMMAND", required=True
    )
    decode = commands.add_parser(
        "decode",
        help="measure decoding with random weights on this GPU, relative to the memory-bound minimum",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    decode.add_argument("--config", required=True, help="name of a shipped configuration, or a YAML file")
    decode.add_argument(
        "--context", type=int, metavar="N", help="cached tokens at the end (default: the model's context)"
    )
    decode.add_argument("--new-tokens", type=int, default=128, metavar="N", help="tokens to decode (default: 128)")
    decode.add_argument(
        "--cache-dtype",
        choices=("bfloat16", "int8", "fp8"),
        default="bfloat16",
        help="dtype of latents (default: bfloat16)",
    )
    decode.add_argument(
        "--memory-gb", type=float, metavar="GB", help="memory limit in 10^9 bytes, including CUDA's context"
    )
    decode.add_argument(
        "--chunk-size", type=int, default=8192, metavar="N", help="tokens per prefill step (default: 8192)"
    )
    decode.add_argument("--skip-prefill", action="store_true", help="fill the cache with random values instead")
    decode.add_argument(
        "--out", type=Path, metavar="FILE", help="save the row: .json (overwritten), or .csv (appended)"
    )
    decode.set_defaults(run=run_decode)
    train = commands.add_parser(
        "train",
        help="measure training steps on random tokens: throughput, utilisation, memory",
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("--config", required=True, help="name of a shipped configuration, or a YAML file")
    train.add_argument("--seq", type=int, required=True, metavar="N", help="tokens per window")
    train.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="ranks: one per GPU, or CPU processes (default: 1)"
    )
    train.add_argument("--batch", type=int, default=1, metavar="N", help="windows per rank and step (default: 1)")
    train.add_argument("--steps", type=int, default=10, metavar="N", help="measured steps (default: 10)")
    train.add_argument(
        "--recompute", nargs="*", choices=("none", "selective", "full", "auto"), default=["selective"],
        help="recomputation modes to measure; none given: only --ddp and --peer (default: selective)",
    )  # fmt: skip
    train.add_argument("--layers", type=int, metavar="N", help="number of layers that recompute (default: all)")
    train.add_argument("--compile", action="store_true", help="compile each layer, also of the peer")
    train.add_argument(
        "--fp8", choices=("none", "tensorwise", "rowwise", "rowwise_with_gw_hp"), default="none",
        help="fp8 recipe of the layers' linear products; requires --compile (default: none)",
    )  # fmt: skip
    train.add_argument("--cp", type=int, default=1, metavar="N", help="context parallel ranks per window (default: 1)")
    train.add_argument(
        "--replicate", type=int, default=1, metavar="N", help="replicas of the sharded weights, HSDP (default: 1)"
    )
    train.add_argument("--offload", action="store_true", help="store saved activations in host memory")
    train.add_argument("--cap", type=float, metavar="GB", help="memory limit per rank in 10^9 bytes")
    train.add_argument(
        "--warm-up", type=int, default=3, metavar="N", help="steps before the measured ones (default: 3)"
    )
    train.add_argument("--profile", action="store_true", help="measure the share of communication with the profiler")
    train.add_argument("--peer", action="store_true", help="also measure transformers' model of the same size")
    train.add_argument(
        "--ddp", action="store_true", help="also measure DistributedDataParallel with the same --recompute"
    )
    train.add_argument(
        "--check",
        type=int,
        metavar="N",
        help="instead of measuring, compare gradients under --cp with those under --cp N",
    )
    train.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="compute dtype (default: bfloat16)"
    )
    train.add_argument(
        "--simulate", action="store_true",
        help="measure one rank of --ranks on one GPU: its memory, and its time without communication",
    )  # fmt: skip
    train.add_argument("--out", type=Path, metavar="FILE", help="save the rows as JSON")
    train.set_defaults(run=run_train)
    align = commands.add_parser(
        "align",
        help="measure steps of DPO and SFT with random weights and tokens on this GPU, and with TRL's trainers",
        epilog=ALIGN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    align.add_argument("--config", required=True, help="name of a shipped configuration, or a YAML file")
    align.add_argument("--task", choices=("dpo", "sft"), required=True, help="training stage")
    align.add_argument("--seq", type=int, required=True, metavar="N", help="tokens per row; a pair has two rows")
    align.add_argument("--batch", type=int, default=1, metavar="N", help="rows or pairs per step (default: 1)")
    align.add_argument("--steps", type=int, default=5, metavar="N", help="measured steps (default: 5)")
    align.add_argument(
        "--warm-up", type=int, default=2, metavar="N", help="steps before the measured ones (default: 2)"
    )
    align.add_argument("--compile", action="store_true", help="compile ictx's layers")
    align.add_argument(
        "--recompute", choices=("none", "selective", "full"), default="",
        help="recomputation mode (default: full for trl, as in TRL, else selective)",
    )  # fmt: skip
    align.add_argument(
        "--only", nargs="+", choices=("trl", "trl+ictx", "ictx"), default=["trl", "trl+ictx", "ictx"],
        help="trl: TRL with SDPA; trl+ictx: TRL with ictx's attention; ictx: ictx's loop (default: all)",
    )  # fmt: skip
    align.add_argument("--out", type=Path, metavar="FILE", help="save the rows as JSON")
    align.set_defaults(run=run_align)
    links = commands.add_parser(
        "links",
        help="measure all-reduce between each pair of nodes and over all ranks (NCCL, or Gloo without GPUs)",
        epilog=LINKS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    links.add_argument(
        "--size-mb", type=int, default=256, metavar="MB", help="message size in 10^6 bytes (default: 256)"
    )
    links.add_argument("--times", type=int, default=5, metavar="N", help="measured repetitions (default: 5)")
    links.add_argument("--out", type=Path, metavar="FILE", help="save the results as JSON")
    links.set_defaults(run=run_links)


def run_decode(arguments: argparse.Namespace) -> int:
    """Runs `ictx bench decode`."""
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
    """Runs `ictx bench train`."""
    import json
    from dataclasses import asdict, replace

    import torch

    from ictx.bench.train_case import Case
    from ictx.bench.train_ranks import Job, check, run
    from ictx.bench.train_report import checked, lines, projection
    from ictx.errors import UserError
    from ictx.model import ModelConfig
    from ictx.parallel import Layout, float8

    try:
        layout = Layout(arguments.replicate, cp=arguments.cp)
        reference = Layout(cp=arguments.check) if arguments.check is not None else None
        config = ModelConfig.named(arguments.config)
        for one in (layout, reference or layout):
            one.check_model(config.num_attention_heads, arguments.seq)
    except ValueError as error:
        raise UserError(str(error)) from error
    if reference and arguments.replicate != 1:
        raise UserError("--check compares sharded gradients: leave --replicate out")
    first = Case(
        config, arguments.seq, arguments.batch, layers=arguments.layers, compile=arguments.compile,
        steps=arguments.steps, warm_up=arguments.warm_up, offload=arguments.offload, profile=arguments.profile,
        dtype=arguments.dtype, fp8=arguments.fp8,
    )  # fmt: skip
    cases = [replace(first, recompute=mode) for mode in arguments.recompute]
    if arguments.fp8 != "none" and not (arguments.compile and arguments.dtype == "bfloat16"):
        raise UserError(f"--fp8 is {arguments.fp8}: give --compile too, and --dtype bfloat16")
    if arguments.fp8 != "none":
        float8.check(arguments.fp8, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if "auto" in arguments.recompute and (arguments.ddp or arguments.layers is not None or arguments.offload):
        raise UserError("--recompute auto chooses by itself: leave --layers, --offload and --ddp out")
    if arguments.ddp:
        cases.append(replace((cases or [first])[0], implementation="ddp"))
    if arguments.peer:
        cases.append(replace(first, recompute="full", layers=None, implementation="transformers"))
    if arguments.cp > 1 and (arguments.ddp or arguments.peer):
        raise UserError("--ddp and --peer have whole windows on each rank: leave --cp out")
    if arguments.simulate and (reference or arguments.ddp or arguments.peer or arguments.profile):
        raise UserError("--simulate has no communication or results: leave --check, --ddp, --peer and --profile out")
    if not cases:
        raise UserError("--recompute has no mode: give one, --ddp or --peer")
    cap = None if arguments.cap is None else arguments.cap * 1e9
    if reference:
        checks = check(Job(cases[:1], layout, cap, reference), arguments.ranks)
        print("\n".join(checked(checks)))
        found = [asdict(one) for one in checks]
    else:
        rows = run(Job(cases, layout, cap, simulate=arguments.simulate), arguments.ranks)
        print("\n".join([*lines(rows), *projection(cases[0], rows[0])]))
        found = [asdict(row) for row in rows]
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return 0


def run_align(arguments: argparse.Namespace) -> int:
    """Runs `ictx bench align`."""
    import json
    from dataclasses import asdict

    from ictx.bench.align import AlignCase, run
    from ictx.errors import UserError
    from ictx.model import ModelConfig

    for name in ("seq", "batch", "steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}: expected 1 or more")
    config, rows = ModelConfig.named(arguments.config), []
    for implementation in arguments.only:
        row = run(
            AlignCase(
                arguments.task, implementation, config, arguments.seq, arguments.batch, arguments.steps,
                arguments.warm_up, arguments.compile, arguments.recompute,
            )
        )  # fmt: skip
        rows.append(row)
        print(row.line(), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", "utf-8")
    return 0


def run_links(arguments: argparse.Namespace) -> int:
    """Runs `ictx bench links`."""
    import json
    from dataclasses import asdict

    from ictx.bench.pairs import lines, measure
    from ictx.errors import UserError
    from ictx.train.ranks import joined

    for name, value in (("size-mb", arguments.size_mb), ("times", arguments.times)):
        if value < 1:
            raise UserError(f"--{name} is {value}: expected 1 or more")
    with joined() as ranks:
        found = measure(ranks, arguments.size_mb * 10**6, arguments.times)
        ranks.say("\n".join(lines(found)))
        if arguments.out and ranks.first:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(asdict(found), indent=2) + "\n", "utf-8")
    return 0
