"""`ictx kernels tune`: finds the fastest configuration of each kind of input on this GPU, and writes it to the file.

Processes compile candidates while those that are ready are measured. Candidates that must not ship (a spill, too much
shared memory) are left out. Each kind has its share of the time: what one does not need, the later ones get.
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
    began, device = time.monotonic(), torch.device("cuda")
    target = dispatch.capability(device)
    kinds = [*decode_kinds(target, functools.partial(dispatch.fast_memory, device)), *attention_kinds(target)]
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
    tuned.save(target, found, out)
    print(f"written to {out}")
    return 0
