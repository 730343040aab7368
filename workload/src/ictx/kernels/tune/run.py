"""`ictx kernels tune`: finds the fastest configuration of each kind of input on this GPU, and writes it to the file.

Worker processes compile candidates while compiled ones are measured. Candidates that fail the release checks (a spill,
too much shared memory) are skipped. Each kind gets an equal share of the remaining time.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ictx.errors import UserError
from ictx.kernels import dispatch, tuned
from ictx.kernels.tune.attention import attention_kinds
from ictx.kernels.tune.decode import decode_kinds
from ictx.kernels.tune.kind import Kind


def search(kind: Kind, ready: dict[Future[bool], Any], until: float) -> dict[Any, float]:
    """Measures candidates as they are compiled; returns the times of those that pass the release checks."""
    seconds, left = kind.prepare(), set(ready)

    def take(config: Any) -> float:
        try:
            return seconds(config)
        except Exception:  # the GPU or the local compiler does not support it
            return float("inf")

    # The current configuration is measured first; the call compiles it.
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
    """Searches for about `limit` seconds and writes the configurations to `out`; returns the exit status.

    Raises UserError if there is no GPU, or no kind with a name in `wanted`.
    """
    if not torch.cuda.is_available():
        raise UserError("no NVIDIA GPU found: run `ictx kernels tune` on a machine with one")
    began, device = time.monotonic(), torch.device("cuda")
    target = dispatch.capability(device)
    kinds = [*decode_kinds(target, functools.partial(dispatch.fast_memory, device)), *attention_kinds(target)]
    if unknown := sorted(set(wanted or ()) - {kind.name for kind in kinds}):
        raise UserError(f"no such kind on this GPU: {unknown[0]} (expected {', '.join(kind.name for kind in kinds)})")
    kinds = [kind for kind in kinds if not wanted or kind.name in wanted]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        # Measurements reuse the kernels that the workers compiled.
        os.environ["TRITON_CACHE_DIR"] = folder
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:

            def submit(kind: Kind) -> dict[Future[bool], Any]:
                # Random order: if time runs out, the measured candidates are spread over the search space.
                mixed = random.Random(0).sample(kind.candidates, len(kind.candidates))
                return {
                    pool.submit(kind.fit, Path(folder), config): config for config in mixed if config != kind.current
                }

            following = submit(kinds[0])
            for number, kind in enumerate(kinds):
                ready = following
                # Queue the next kind's candidates after this one's.
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
    tuned.save(target, found, out)
    print(f"written to {out}")
    return 0
