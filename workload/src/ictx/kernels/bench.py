"""`ictx kernels bench`: our kernels beside what else computes the same, on the same inputs in the same run.

Times are medians over replays of a CUDA graph that goes through several sets of random inputs, so that no set stays
in the L2 cache. The ceilings, copy bandwidth and matrix rate, are measured in the same run.
"""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.util
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ictx.errors import UserError
from ictx.kernels import attention_bench, layout
from ictx.kernels.decode import mla_decode
from ictx.kernels.decode_peers import PEERS, Call
from ictx.kernels.rope_cache import mla_rope_cache

HEADS = 16
PAGE = 64
SCALE = 192**-0.5
CASES = [
    (1, 4096, None), (1, 32768, None), (1, 131072, None), (1, 1 << 20, None), (32, 32768, None), (1, 131072, "int8"),
    (1, 131072, "fp8"), (1, 1 << 20, "int8"), (32, 32768, "int8"),
]  # fmt: skip
"""Batch, context, dtype of a quantised cache."""
DIFFERS = 2e-2
"""Relative difference of two results from which they are not the same: two roundings to bfloat16 are far below."""
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
    """Bytes of the cached rows over the time, as a share of the measured copy bandwidth."""
    note: str = ""


def median_time(calls: list[Callable[[], object]], repeats: int = 15) -> float:
    """Returns the median time of one call in seconds, over replays of a graph that makes each call in turn.

    Calls of more than a tenth of a second are made fewer times, but five at least.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    # What the calls read may still be written.
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        stream.synchronize()
        begun = time.perf_counter()
        calls[0]()
        stream.synchronize()
    times = max(1, 8 // len(calls)) * len(calls)
    if time.perf_counter() - begun > 0.1:
        times, repeats = 1, 5
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(times):
            calls[index % len(calls)]()
    graph.replay()
    measured = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        measured.append(begin.elapsed_time(end) / times * 1e-3)
    return float(sorted(measured)[repeats // 2])


def copy_bandwidth() -> float:
    """Returns the best of several device-to-device copies in bytes read and written per second."""
    best = 0.0
    for size in (1 << 28, 1 << 30, 1 << 31):
        sources = [torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda") for _ in range(2)]
        target = torch.empty_like(sources[0])
        calls: list[Callable[[], object]] = [functools.partial(target.copy_, source) for source in sources]
        best = max(best, 2 * size / median_time(calls))
        # The next size does not find this one's memory taken.
        del sources, target, calls
        torch.cuda.empty_cache()
    return best


def matrix_rate() -> float:
    """Returns the rate of a bfloat16 product of two 8192 × 8192 matrices in operations per second."""
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / median_time([lambda: left @ right])


@dataclass
class Inputs:
    """Random queries and caches of one case, several sets of them: more bytes than the L2 cache holds."""

    queries: list[Tensor]
    caches: list[Tensor]
    plain: list[Tensor]
    """The caches before they are quantised."""
    table: Tensor
    lens: Tensor

    @property
    def context(self) -> int:
        """Cached tokens of each sequence."""
        return self.plain[0].shape[0] * PAGE // len(self.lens)

    @classmethod
    def make(
        cls, batch: int, context: int, stored: str | None, heads: int = HEADS, dtype: torch.dtype = torch.bfloat16
    ) -> Inputs:
        """Returns inputs with blocks of 64."""
        sets = 2 if batch * context * (layout.ROW_BYTES if stored else 2 * layout.ROW) > 10**8 else 8
        blocks = context // PAGE
        plain = [torch.randn(batch * blocks, PAGE, layout.ROW, dtype=dtype, device="cuda") for _ in range(sets)]
        return cls(
            [torch.randn(batch, 1, heads, layout.ROW, dtype=dtype, device="cuda") for _ in range(sets)],
            [layout.quantise(cache, stored) for cache in plain] if stored else plain,
            plain,
            torch.arange(batch * blocks, dtype=torch.int32, device="cuda").view(batch, blocks),
            torch.full((batch,), context, dtype=torch.int32, device="cuda"),
        )


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
        except Exception as error:  # whatever a peer's library raises is its result
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(Row(name, batch, context, kept, None, None, told[:100]))
        torch.cuda.empty_cache()
    return rows


def measure_rope_cache(tokens: int, stored: str | None, bandwidth: float) -> Row:
    """Returns the time of writing that many new tokens; its bytes are the inputs and the rows that are written."""
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
    """Draws bandwidth over context and speed-up over eager, where Matplotlib is installed."""
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
        axis.legend()
    figure.tight_layout()
    figure.savefig(out / "decode.png", dpi=110)


def main(out: Path, quick: bool, only: str | None = None) -> int:
    """Measures, prints and saves; returns the exit status."""
    if not torch.cuda.is_available():
        raise UserError("no NVIDIA GPU: nothing can be measured here")
    import triton

    out.mkdir(parents=True, exist_ok=True)
    bandwidth, rate = copy_bandwidth(), matrix_rate()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"{datetime.date.today()}"
    )
    print(f"copy {bandwidth * 1e-12:.3f} TB/s, bfloat16 product {rate * 1e-12:.0f} TFLOP/s")
    if only != "attention":
        _decode(out, quick, bandwidth)
    if only != "decode":
        attention_bench.save(attention_bench.measure(rate, quick), out)
    return 0


def _decode(out: Path, quick: bool, bandwidth: float) -> None:
    """Measures, prints and saves what decodes."""
    rows: list[Row] = []
    for batch, context, stored in CASES[:2] if quick else CASES:
        for row in measure(batch, context, stored, bandwidth, peers=True):
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
