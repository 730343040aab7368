"""The part of `ictx kernels bench` for `mla_decode` and `mla_rope_cache`.

Times are medians over replays of a CUDA graph that cycles through several sets of random inputs, so that no set stays
in the L2 cache.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ictx.kernels import layout
from ictx.kernels.bench.decode_peers import PEERS, Call
from ictx.kernels.bench.inputs import PAGE, SCALE, Inputs
from ictx.kernels.bench.timing import median_time
from ictx.kernels.decode.op import mla_decode
from ictx.kernels.rope_cache.op import mla_rope_cache

CASES = [
    (batch, context, stored)
    for stored in (None, "int8", "fp8")
    for batch, context in ((1, 4096), (1, 32768), (1, 131072), (1, 1 << 20), (32, 32768))
]
"""Batch, context, dtype of a quantised cache."""
DIFFERS = 2e-2
"""Relative difference above which two results do not match; two roundings to bfloat16 differ by far less."""
ROPE_CACHE_CASES = [(1, None), (32, None), (8192, None), (32, "int8"), (8192, "int8"), (8192, "fp8")]
"""New tokens, dtype of a quantised cache."""


@dataclass
class Row:
    """One measurement."""

    implementation: str
    batch: int
    context: int
    cache: str
    microseconds: float | None
    share_of_copy: float | None
    """Bytes of the cached rows divided by the time, as a share of the measured copy bandwidth."""
    note: str = ""


def measure(batch: int, context: int, stored: str | None, bandwidth: float, peers: bool) -> list[Row]:
    """Returns the times of every implementation on one case."""
    moved = batch * context * (layout.ROW_BYTES if stored else 2 * layout.ROW)
    given = Inputs.make(batch, context, stored)
    kept = stored or "bf16"

    def ours(at: int) -> Tensor:
        return mla_decode(given.queries[at], given.caches[at], given.lens, SCALE, given.table, stored)[0]

    def take(name: str, call: Call, note: str = "") -> Row:
        seconds = median_time([functools.partial(call, at) for at in range(len(given.queries))])
        return Row(name, batch, context, kept, seconds * 1e6, moved / seconds / bandwidth, note)

    rows = [take("ictx", ours)]
    wanted = ours(0).flatten().float()
    for name, make in PEERS.items() if peers and not stored else ():
        try:
            call = make(given, SCALE)
            off = float((call(0).flatten().float() - wanted).norm() / wanted.norm())
            rows.append(take(name, call, "" if off <= DIFFERS else f"its result differs by {off:.1%}"))
        except ImportError:
            rows.append(Row(name, batch, context, kept, None, None, "not installed"))
        except Exception as error:  # a peer's failure is reported as its result
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(Row(name, batch, context, kept, None, None, reason[:100]))
        torch.cuda.empty_cache()
    return rows


def measure_rope_cache(tokens: int, stored: str | None, bandwidth: float) -> Row:
    """Returns the time to write `tokens` new tokens; the bytes count the inputs and the written rows."""
    sets = 8
    xs = [torch.randn(tokens, layout.ROW, dtype=torch.bfloat16, device="cuda") for _ in range(sets)]
    width, dtype = (layout.ROW_BYTES, torch.uint8) if stored else (layout.ROW, torch.bfloat16)
    caches = [torch.zeros(-(-tokens // PAGE), PAGE, width, dtype=dtype, device="cuda") for _ in range(sets)]
    weight = torch.ones(layout.LATENT, dtype=torch.bfloat16, device="cuda")
    cos, sin = (torch.randn(tokens, layout.ROPE // 2, device="cuda") for _ in range(2))
    slots = torch.arange(tokens, device="cuda")
    seconds = median_time(
        [lambda at=at: mla_rope_cache(xs[at], weight, cos, sin, slots, caches[at], stored=stored) for at in range(sets)]  # type: ignore[misc]
    )
    moved = tokens * (2 * layout.ROW + (layout.ROW_BYTES if stored else 2 * layout.ROW) + 4 * layout.ROPE + 8)
    return Row("ictx rope_cache", tokens, 1, stored or "bf16", seconds * 1e6, moved / seconds / bandwidth)


def plot(rows: list[Row], out: Path) -> None:
    """Plots bandwidth and the speed-up over each peer against the context, if Matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: Matplotlib is not installed")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours = {(row.batch, row.context): row for row in rows if row.implementation == "ictx" and row.cache == "bf16"}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name in sorted({row.implementation for row in rows}):
        if "rope_cache" in name:
            continue
        points = [
            r for r in rows if r.implementation == name and r.cache == "bf16" and r.batch == 1 and r.share_of_copy
        ]
        if not points:
            continue
        left.plot([r.context for r in points], [100 * (r.share_of_copy or 0) for r in points], marker="o", label=name)
        if name != "ictx":
            ratios = [(r.microseconds or 0) / (ours[r.batch, r.context].microseconds or 1) for r in points]
            right.plot([r.context for r in points], ratios, marker="o", label=f"over {name}")
    left.set(xscale="log", xlabel="cached tokens, batch 1", ylabel="% of copy bandwidth", title="decode")
    right.set(xscale="log", xlabel="cached tokens, batch 1", ylabel="times faster", title="speed-up")
    for axis in (left, right):
        axis.grid(True, alpha=0.3)
        if axis.lines:  # without peers there is no speed-up to draw
            axis.legend()
    figure.tight_layout()
    figure.savefig(out / "decode.png", dpi=110)


def run(out: Path, quick: bool, bandwidth: float, peers: bool = True) -> None:
    """Measures, prints and saves the decode and cache-write benchmarks."""
    rows: list[Row] = []
    for batch, context, stored in CASES[:2] if quick else CASES:
        for row in measure(batch, context, stored, bandwidth, peers):
            rows.append(row)
            time = f"{row.microseconds:10.1f} µs {100 * (row.share_of_copy or 0):6.1f} % " if row.microseconds else ""
            where = f"batch {batch:3} context {context:8} {row.cache:5}"
            print(f"{row.implementation:16} {where} {time}{row.note}", flush=True)
        torch.cuda.empty_cache()
    for tokens, stored in () if quick else ROPE_CACHE_CASES:
        row = measure_rope_cache(tokens, stored, bandwidth)
        rows.append(row)
        print(f"{row.implementation} {tokens} tokens {row.cache:5} {row.microseconds:10.1f} µs", flush=True)
    with (out / "decode.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    plot(rows, out)
