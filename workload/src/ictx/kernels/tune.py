"""`ictx kernels tune`: finds the fastest configuration of each kind of input on this GPU, and writes it to the file.

Processes compile candidates while those that are ready are measured. Candidates that must not ship (a spill, too much
shared memory) are left out. Each kind has its share of the time: what one does not need, the later ones get.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ictx.errors import UserError
from ictx.kernels import bench, build, dispatch, layout, tuning
from ictx.kernels.decode import block_m_of, mla_decode
from ictx.kernels.tuning import DecodeConfig

CASES = [(1, 131072), (32, 32768)]
"""Batch and context whose times are multiplied: what a candidate must be good at."""
PAGE = 64


@dataclass(frozen=True)
class Kind:
    """One kind of input, or one kernel, with a configuration of its own."""

    section: str
    """Of the file."""
    name: str
    current: Any
    """Its configuration so far: measured first, and kept where nothing is faster."""
    candidates: list[Any]
    fit: Callable[[Path, Any], bool]
    """Compiles a candidate into a folder, in a process of its own; whether it may ship."""
    prepare: Callable[[], Callable[[Any], float]]
    """Makes inputs; returns what measures a candidate, in seconds."""


def decode_candidates() -> list[DecodeConfig]:
    """Returns the configurations of `mla_decode` that are tried; one stage is all that Turing can do."""
    found = []
    for block_n, warps, stages in itertools.product((16, 32, 64), (4, 8), (1, 2, 3, 4, 5)):
        for programs, registers in ((1, 0), (1, 240), (2, 0)):
            # More warps than a block has tokens for only repeat each other's work; 240 registers need few warps.
            if warps * 8 <= max(block_n, 32) * 2 and not (warps == 8 and registers):
                found.append(DecodeConfig(block_n, warps, stages, programs, registers=registers))
    return found


def decode_kinds(target: int) -> list[Kind]:
    """Returns the kinds of input of `mla_decode`, those with more bytes saved first."""
    dtype = dispatch.half(target)
    kinds = []
    for stored, rows in itertools.product(
        (None, "int8", "fp8"), sorted({block_m_of(rows, target) for rows in (1, 32)})
    ):
        if dispatch.refused("mla_decode", target, dtype, stored) is None:
            kinds.append(
                Kind(
                    "decode",
                    tuning.decode_key(rows, stored),
                    tuning.decode_config(target, rows, stored),
                    decode_candidates(),
                    functools.partial(decode_fits, target=target, stored=stored, block_m=rows),
                    functools.partial(decode_inputs, stored, rows, dtype),
                )
            )
    return kinds


def decode_fits(cache: Path, config: DecodeConfig, *, target: int, stored: str | None, block_m: int) -> bool:
    """Whether a candidate for `mla_decode` may ship."""
    dtype, meta = dispatch.half(target), torch.device("meta")
    q = torch.empty(1, 1, block_m, layout.ROW, dtype=dtype, device=meta)
    row, held = (layout.ROW_BYTES, torch.uint8) if stored else (layout.ROW, dtype)
    blocks = torch.empty(2, PAGE, row, dtype=held, device=meta)
    lens, table = (torch.empty(shape, dtype=torch.int32, device=meta) for shape in ((1,), (1, 2)))
    tuning.override = config
    try:
        return build.fit(cache, target, lambda: mla_decode(q, blocks, lens, bench.SCALE, table, stored))
    except Exception:  # what the compiler cannot make is no candidate
        return False


def decode_inputs(stored: str | None, rows: int, dtype: torch.dtype) -> Callable[[DecodeConfig], float]:
    """Returns what measures a candidate: the product of the times of all cases."""
    given = [bench.Inputs.make(batch, context, stored, bench.HEADS * rows // 16, dtype) for batch, context in CASES]

    def seconds(config: DecodeConfig) -> float:
        product = 1.0
        for one in given:
            calls: list[Callable[[], object]] = [
                functools.partial(mla_decode, q, cache, one.lens, bench.SCALE, one.table, stored, config=config)
                for q, cache in zip(one.queries, one.caches, strict=True)
            ]
            product *= bench.median_time(calls)
        return product

    return seconds


def search(kind: Kind, ready: dict[Future[bool], Any], until: float) -> dict[Any, float]:
    """Measures candidates as they are compiled; returns the times of those that may ship."""
    seconds, left = kind.prepare(), set(ready)

    def take(config: Any) -> float:
        try:
            return seconds(config)
        except Exception:  # the GPU, or the compiler here, refuses it
            return float("inf")

    # The one in use is measured at once: what it needs is compiled by the call.
    times = {kind.current: take(kind.current)}
    while left and time.monotonic() < until:
        done, left = wait(left, max(until - time.monotonic(), 0), FIRST_COMPLETED)
        for future in done:
            config = ready[future]
            if future.result() and time.monotonic() < until:
                times[config] = take(config)
    for future in left:
        future.cancel()
    return times


def main(limit: float, out: Path, jobs: int, wanted: list[str] | None = None) -> int:
    """Searches for about `limit` seconds and writes what it found to `out`; returns the exit status.

    Raises UserError where there is no GPU, or no kind of a wanted name.
    """
    if not torch.cuda.is_available():
        raise UserError("no NVIDIA GPU: nothing can be tuned here")
    from ictx.kernels.attention_tune import attention_kinds

    began, target = time.monotonic(), dispatch.capability(torch.device("cuda"))
    kinds = [*decode_kinds(target), *attention_kinds(target)]
    if unknown := sorted(set(wanted or ()) - {kind.name for kind in kinds}):
        raise UserError(f"no such kind on this GPU: {unknown[0]} (there are {', '.join(kind.name for kind in kinds)})")
    kinds = [kind for kind in kinds if not wanted or kind.name in wanted]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        # The compiler looks here at run time too.
        os.environ["TRITON_CACHE_DIR"] = folder
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:

            def submit(kind: Kind) -> dict[Future[bool], Any]:
                # In any order: where time ends the search, what was tried lies all over the candidates.
                mixed = random.Random(0).sample(kind.candidates, len(kind.candidates))
                return {
                    pool.submit(kind.fit, Path(folder), config): config for config in mixed if config != kind.current
                }

            following = submit(kinds[0])
            for number, kind in enumerate(kinds):
                ready = following
                # The next kind's compile behind this one's.
                following = submit(kinds[number + 1]) if number + 1 < len(kinds) else {}
                until = time.monotonic() + (limit - (time.monotonic() - began)) / (len(kinds) - number)
                times = search(kind, ready, until)
                torch.cuda.empty_cache()
                best = min(times, key=lambda config: times[config])
                found.setdefault(kind.section, {})[kind.name] = best
                tried = sum(future.done() and not future.cancelled() for future in ready) + 1
                print(
                    f"{kind.name:14} {times[kind.current] / times[best]:.3f}× as fast as before, {len(times)} measured "
                    f"and {tried} compiled of {len(ready) + 1}: {asdict(best)}",
                    flush=True,
                )
    tuning.save(target, found, out)
    print(f"written to {out}")
    return 0
