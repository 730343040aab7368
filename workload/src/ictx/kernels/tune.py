"""`ictx kernels tune`: finds the fastest configuration of each kind of input on this GPU, and writes it to the file.

Candidates that must not ship (a spill, too much shared memory) are left out before anything is measured.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from ictx.errors import UserError
from ictx.kernels import bench, build, dispatch, tuning
from ictx.kernels.decode import mla_decode
from ictx.kernels.tuning import DecodeConfig

CASES = [(1, 131072), (32, 32768)]
"""Batch and context whose times are multiplied: what a candidate must be good at."""
PAGE = 64


def candidates() -> Iterator[DecodeConfig]:
    """Yields the configurations that are tried."""
    for block_n, warps, stages in itertools.product((16, 32, 64), (4, 8), (2, 3, 4, 5)):
        for programs, registers in ((1, 0), (1, 240), (2, 0)):
            # More warps than a block has tokens for only repeat each other's work; 240 registers need few warps.
            if warps * 8 <= max(block_n, 32) * 2 and not (warps == 8 and registers):
                yield DecodeConfig(block_n, warps, stages, programs, registers=registers)


def fit(cache: Path, target: int, stored: str | None, block_m: int, config: DecodeConfig) -> bool:
    """Compiles a candidate, in a process of its own; returns whether it may ship."""
    variant = build.Variant("mla_decode", target, "bf16" if target >= 80 else "fp16", stored, PAGE, block_m)
    tuning.override = config
    try:
        with build.compiling(cache, target):
            return not build.inspect(variant, build.compile_variant(variant)).faults
    except Exception:  # what the compiler cannot make is no candidate
        return False


def seconds(stored: str | None, block_m: int, config: DecodeConfig, given: list[bench.Inputs]) -> float:
    """Returns the product of the times of all cases, or infinity where the GPU refuses the launch."""
    product = 1.0
    for one in given:
        calls: list[Callable[[], object]] = [
            functools.partial(mla_decode, q, cache, one.lens, bench.SCALE, one.table, stored, config=config)
            for q, cache in zip(one.queries, one.caches, strict=True)
        ]
        try:
            product *= bench.median_time(calls)
        except RuntimeError:
            return float("inf")
    return product


def main(limit: float, out: Path, jobs: int) -> int:
    """Searches for at most `limit` seconds and writes what it found to `out`; returns the exit status."""
    if not torch.cuda.is_available():
        raise UserError("no NVIDIA GPU: nothing can be tuned here")
    began, target = time.monotonic(), dispatch.capability(torch.device("cuda"))
    found: dict[str, DecodeConfig] = {}
    kinds = [(stored, rows) for stored in (None, "int8", "fp8") for rows in (16, 32)]
    kinds = [kind for kind in kinds if dispatch.refused("mla_decode", target, torch.bfloat16, kind[0]) is None]
    with tempfile.TemporaryDirectory() as folder:
        # The compiler looks here at run time too.
        os.environ["TRITON_CACHE_DIR"] = folder
        for number, (stored, rows) in enumerate(kinds):
            allowed = (limit - (time.monotonic() - began)) / (len(kinds) - number)
            until = time.monotonic() + allowed
            grid = [tuning.decode_config(target, rows, stored), *candidates()]
            with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
                count = len(grid)
                good = pool.map(fit, [Path(folder)] * count, [target] * count, [stored] * count, [rows] * count, grid)
                grid = [config for config, fits in zip(grid, good, strict=True) if fits]
            heads = bench.HEADS * rows // 16
            given = [bench.Inputs.make(batch, context, stored, heads) for batch, context in CASES]
            times: dict[DecodeConfig, float] = {}
            for config in grid:
                if times and time.monotonic() > until:
                    print(
                        f"{tuning.decode_key(rows, stored)}: {len(times)} of {len(grid)} candidates in the time given"
                    )
                    break
                times[config] = seconds(stored, rows, config, given)
            del given
            torch.cuda.empty_cache()
            if times:
                best = min(times, key=lambda config: times[config])
                found[tuning.decode_key(rows, stored)] = best
                gain = times[grid[0]] / times[best]
                print(f"{tuning.decode_key(rows, stored):14} {asdict(best)} {gain:.3f}× the product before", flush=True)
    tuning.save_decode(target, found, out)
    print(f"written to {out}")
    return 0
