"""The command line: `ictx kernels build|explain|tune|bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXPLAIN = """
examples:
  ictx kernels explain
  ictx kernels explain --capability 75
"""
BUILD = """
examples:
  ictx kernels build
  ictx kernels build --cache /opt/ictx/kernels --target 80 90
"""
TUNE = """
examples:
  ictx kernels tune --seconds 300
  ictx kernels tune --kind int8/rows16 --out tuned.json
"""
BENCH = """
examples:
  ictx kernels bench --out bench/
  ictx kernels bench --quick --only decode --out bench/
  ictx kernels bench --only decode --no-peers --out bench/
"""


def register(areas: Any) -> None:
    """Adds `kernels` to the areas of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    area = areas.add_parser("kernels", help="select, build, tune and benchmark GPU kernels")
    commands = area.add_subparsers(metavar="COMMAND", required=True)
    explain = commands.add_parser(
        "explain",
        help="print the implementation chosen for each operation, with the reason",
        epilog=EXPLAIN,
        formatter_class=raw,
    )
    explain.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="(default: bfloat16)"
    )
    explain.add_argument(
        "--capability",
        type=int,
        metavar="CC",
        help="compute capability of a GPU, such as 90 (default: this machine's)",
    )
    explain.set_defaults(run=run_explain)
    build = commands.add_parser(
        "build",
        help="compile every kernel ahead of time; fails on a spill or a lost tensor-core instruction",
        epilog=BUILD,
        formatter_class=raw,
    )
    build.add_argument(
        "--cache",
        type=Path,
        help="folder for the compiled kernels (default: ICTX_KERNEL_CACHE, or ~/.cache/ictx/kernels)",
    )
    build.add_argument(
        "--target", type=int, nargs="+", metavar="CC", help="compute capabilities (default: all supported ones)"
    )
    build.add_argument("--jobs", type=int, default=2, help="parallel compile processes (default: 2)")
    build.set_defaults(run=run_build)
    tune = commands.add_parser(
        "tune",
        help="find the fastest configurations on this GPU and save them",
        description="Tunes the decode kernel for each kind of input (cache and rows per program: plain/rows16, "
        "int8/rows16, …) and the attention kernels (forward, keys_values, queries). Candidates compile while others "
        "are measured; each kind gets an equal share of the time, and unused time goes to the later ones.",
        epilog=TUNE,
        formatter_class=raw,
    )
    tune.add_argument("--out", type=Path, help="file to write (default: the installed package's)")
    tune.add_argument("--seconds", type=float, default=600, help="total time of the search (default: 600)")
    tune.add_argument("--jobs", type=int, default=8, help="parallel compile processes (default: 8)")
    tune.add_argument("--kind", nargs="+", metavar="KIND", help="kinds to tune, such as int8/rows16 (default: all)")
    tune.set_defaults(run=run_tune)
    bench = commands.add_parser(
        "bench",
        help="benchmark the kernels and other libraries on this GPU",
        epilog=BENCH,
        formatter_class=raw,
    )
    bench.add_argument("--out", type=Path, required=True, help="folder for CSV files and plots")
    bench.add_argument("--quick", action="store_true", help="only the shortest contexts")
    bench.add_argument("--only", choices=("decode", "attention"), help="one part (default: both)")
    bench.add_argument("--no-peers", dest="peers", action="store_false", help="do not measure other libraries")
    bench.set_defaults(run=run_bench)


def run_explain(arguments: argparse.Namespace) -> int:
    """Runs `ictx kernels explain`."""
    import torch

    from ictx.kernels.dispatch import explain

    device = torch.device("cuda" if torch.cuda.is_available() and arguments.capability is None else "cpu")
    for operation, stored, choice in explain(device, getattr(torch, arguments.dtype), arguments.capability):
        print(f"{operation:15} {stored:7} {choice.name:7} {choice.reason}")
    return 0


def run_build(arguments: argparse.Namespace) -> int:
    """Runs `ictx kernels build`; returns 1 if a variant fails the checks."""
    from ictx.errors import UserError
    from ictx.infer.launches import drive
    from ictx.kernels.build.build import TARGETS, build
    from ictx.kernels.build.shipped import default_cache
    from ictx.kernels.dispatch import have_triton

    if not have_triton():
        raise UserError("Triton is not installed: pip install triton")
    targets = tuple(arguments.target or TARGETS)
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise UserError(f"--target has {unknown[0]}: expected one or more of {', '.join(map(str, TARGETS))}")
    faulty = 0
    print(f"{'target':7} {'variant':66} {'registers':>9} {'spilled':>7} {'shared':>7} {'matrix':>6} {'cubin':>7}")
    for report in build(arguments.cache or default_cache(), targets, drive, arguments.jobs):
        print(
            f"sm_{report.target:<4} {report.name:66} {report.registers:9} {report.spilled:7} {report.shared:7} "
            f"{report.tensor_cores:6} {report.cubin:7}  {'; '.join(report.faults)}".rstrip()
        )
        faulty += bool(report.faults)
    if faulty:
        print(f"{faulty} variants failed the checks")
    return 1 if faulty else 0


def run_tune(arguments: argparse.Namespace) -> int:
    """Runs `ictx kernels tune`."""
    from ictx.kernels.tune.run import main
    from ictx.kernels.tuned import FILE

    return main(arguments.seconds, arguments.out or FILE, arguments.jobs, arguments.kind)


def run_bench(arguments: argparse.Namespace) -> int:
    """Runs `ictx kernels bench`."""
    from ictx.kernels.bench.run import main

    return main(arguments.out, arguments.quick, arguments.only, arguments.peers)
