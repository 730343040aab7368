"""Output of `ictx bench decode`."""

from __future__ import annotations

import csv
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ictx.bench.decode import Case, Measured

PROJECTED = "RTX 2070 Super"
PROJECTED_BANDWIDTH = 448e9
"""Bytes per second according to the data sheet (256 bits at 14 Gbit/s); a copy is slower."""
PROJECTED_PRODUCTS = 320 * 32 * 1.77e9
"""Products of float16 summed in float32, per second: tensor cores × 32 per clock (half of Quadro's) × clock."""
MOST_RATIO, MOST_OVERHEAD = 1.35, 0.05
"""Targets of the whole model (docs/benchmarks.md)."""


def values(name: str, case: Case, found: Measured) -> dict[str, Any]:
    """Returns one row of results; names end with the unit; GB are 10^9 bytes."""
    floor = case.floor.seconds(found.bandwidth)
    ratio = found.step / floor
    return {
        "date": str(datetime.date.today()),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "config": name,
        "context": case.context,
        "new_tokens": case.new_tokens,
        "cache": case.stored or str(case.dtype).removeprefix("torch."),
        "copy_tb_s": found.bandwidth * 1e-12,
        "prefill_s": found.prefill,
        "ms_per_token": found.step * 1e3,
        "wall_ms_per_token": found.wall * 1e3,
        "weights_gb": case.floor.weights * 1e-9,
        "cache_gb": case.floor.cache * 1e-9,
        "floor_ms": floor * 1e3,
        "ratio": ratio,
        "kernels_ms": None if found.trace is None else found.trace.busy * 1e3,
        "overhead": found.overhead,
        "memory_cap_gb": None if case.memory is None else case.memory * 1e-9,
        "peak_gb": found.taken * 1e-9,
        "peak_tensors_gb": found.allocated * 1e-9,
        "projected_2070s_floor_ms": case.floor.seconds(PROJECTED_BANDWIDTH) * 1e3,
        "projected_2070s_ms": case.floor.seconds(PROJECTED_BANDWIDTH) * ratio * 1e3,
        "projected_2070s_least_ms": projected_least(case) * 1e3,
    }


def projected_least(case: Case) -> float:
    """Returns the minimum seconds per token on the projected GPU, whose tensor cores may be slower than its memory."""
    config = case.config
    row = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    products = config.num_hidden_layers * config.num_attention_heads * (case.context + 1) * row
    read = case.floor.cache / PROJECTED_BANDWIDTH
    return case.floor.weights / PROJECTED_BANDWIDTH + max(read, products / PROJECTED_PRODUCTS)


def lines(row: dict[str, Any], found: Measured) -> Iterator[str]:
    """Yields the lines to print."""
    yield f"{row['gpu']}, torch {row['torch']}, copy {row['copy_tb_s']:.3f} TB/s"
    yield f"{row['config']}, {row['cache']} cache, {row['new_tokens']} tokens decoded up to {row['context']:,}"
    if row["prefill_s"] is None:
        yield "prefill        none: the cache holds random rows"
    else:
        yield f"prefill        {row['prefill_s']:.2f} s"
    yield f"decode         {row['ms_per_token']:.3f} ms/token (median of graph replays)"
    yield (
        f"floor          {row['floor_ms']:.3f} ms: {row['weights_gb']:.3f} GB of weights and {row['cache_gb']:.3f} GB "
        "of cache at the copy's bandwidth"
    )
    yield f"ratio          {row['ratio']:.3f} (must be at most {MOST_RATIO})"
    yield f"wall           {row['wall_ms_per_token']:.3f} ms/token on the host's clock, each token read"
    if row["overhead"] is None:
        yield "overhead       not measured: the profiler recorded no kernels"
    else:
        yield (
            f"overhead       {100 * row['overhead']:.1f} % of the wall time without a running kernel "
            f"({row['kernels_ms']:.3f} ms with; must be under {100 * MOST_OVERHEAD:.0f} %)"
        )
    memory_cap, peak = row["memory_cap_gb"], row["peak_gb"]
    capped = (
        "no cap"
        if memory_cap is None
        else f"{'OVER the' if peak > memory_cap else 'within the'} cap of {memory_cap:g} GB"
    )
    yield f"peak memory    {peak:.2f} GB, {row['peak_tensors_gb']:.2f} GB of it tensors ({capped}; GB are 10^9 bytes)"
    yield (
        f"projection     {PROJECTED} ({PROJECTED_BANDWIDTH * 1e-9:.0f} GB/s), not measured: floor "
        f"{row['projected_2070s_floor_ms']:.2f} ms/token, at the same ratio {row['projected_2070s_ms']:.2f} ms/token; "
        f"its tensor cores allow {row['projected_2070s_least_ms']:.2f} ms/token"
    )
    for name, count, seconds in found.trace.kernels[:12] if found.trace else ():
        yield f"  {seconds * 1e6:9.1f} µs {count:5} × {seconds * 1e6 / max(count, 1):7.2f}  {name[:70]}"


def save(row: dict[str, Any], out: Path) -> None:
    """Writes the row as JSON, or appends it to a CSV file if the suffix is .csv."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".csv":
        new = not out.exists()
        with out.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
    else:
        out.write_text(json.dumps(row, indent=2) + "\n", "utf-8")
