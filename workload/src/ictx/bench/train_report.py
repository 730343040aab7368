"""Output of `ictx bench train`."""

from __future__ import annotations

from collections.abc import Iterator

from ictx.bench.train_case import Case, Row
from ictx.bench.train_check import Check
from ictx.metrics import flops_per_token
from ictx.metrics.efficiency import PEAKS

EPOCH = (372e6, 465e6)
"""Minimum and maximum tokens of an epoch in the specification."""
SPECIFIED_HOURS, CARDS, WINDOW = 2.75, 4, 32768


def lines(rows: list[Row]) -> Iterator[str]:
    """Yields a table, then the parts of time and memory of each row; GB are 10^9 bytes."""
    first = rows[0]
    size = f"{first.batch} × {first.sequence:,} tokens per {f'{first.cp} ranks' if first.cp > 1 else 'rank'} and step"
    width = max(map(len, map(title, rows)))
    devices = f"1 of {first.ranks} ranks simulated" if first.simulated else f"{first.ranks}"
    yield f"{devices} × {first.device}, torch {first.torch}, {size}"
    yield (
        f"{'':{width}} {'s/step':>8} {'tokens/s':>9} {'mfu_causal':>10} {'mfu':>7} {'NVML':>7} {'peak':>8} "
        f"{'reserved':>8}"
    )
    for row in rows:
        if row.step is None or row.tokens_per_second is None:
            yield f"{title(row):{width}} not measured: {row.note}"
            continue
        memory = (f"{row.memory[name] / 1e9:.1f} GB" if name in row.memory else "–" for name in ("peak", "reserved"))
        shares = (f"{100 * share:.1f} %" if share is not None else "–" for share in (row.mfu_causal, row.mfu))
        used = f"{100 * row.utilisation:.0f} %" if row.utilisation is not None else "–"
        causal, full = shares
        peak, reserved = memory
        yield (
            f"{title(row):{width}} {row.step:8.3f} {row.tokens_per_second:9,.0f} {causal:>10} {full:>7} {used:>7} "
            f"{peak:>8} {reserved:>8}"
        )
    for row in (row for row in rows if row.step is not None):
        yield f"{title(row)}:"
        yield "  time    " + ", ".join(f"{part} {seconds:.3f} s" for part, seconds in row.parts.items())
        yield "  memory  " + ", ".join(f"{part} {size / 1e9:.2f} GB" for part, size in row.memory.items())
        if row.communication is not None and row.waiting is not None:
            both = f"{100 * row.communication:.1f} % of a step, {100 * row.waiting:.1f} % with no other kernel running"
            yield f"  NCCL    {both}"
    if first.links:
        yield "links     " + ", ".join(f"{name} {rate / 1e9:.0f} GB/s" for name, rate in first.links.items())


def checked(checks: list[Check]) -> Iterator[str]:
    """Yields one line per comparison."""
    for one in checks:
        yield (
            f"gradients of {one.config}, {one.sequence:,} tokens in {one.documents} documents, {one.dtype}, "
            f"cp {one.cp} against {one.reference_cp} on {one.ranks} ranks: differ by {one.error:.1e} of their norm, "
            f"at most {one.worst:.1e} ({one.worst_weight}); loss {one.loss:.6f} and {one.reference_loss:.6f}"
        )


def title(row: Row) -> str:
    """Returns a row's name."""
    if row.implementation == "transformers":
        return f"{row.implementation}, recompute, {'compiled' if row.compile else 'eager'}"
    layers = f" of {row.layers} layers" if row.layers is not None else ""
    mesh = {"replicate": row.dp_replicate if row.implementation == "ictx" else 1, "cp": row.cp}
    parts = [
        row.implementation, row.attention, f"recompute {row.recompute}{layers}", "compiled" if row.compile else "",
        *(f"{axis} {count}" for axis, count in mesh.items() if count > 1), "offload" if row.offload else "",
        f"fp8 {row.fp8}" if row.fp8 != "none" else "",
    ]  # fmt: skip
    return ", ".join(part for part in parts if part)


def projection(case: Case, row: Row) -> Iterator[str]:
    """Yields the projected time of the specification's epoch on its cards at the measured share of the peak.

    Yields nothing for windows of another length than the specification's, nor without communication.
    """
    if row.mfu_causal is None or row.sequence != WINDOW or row.simulated:
        return
    rate = CARDS * PEAKS["A100"] * row.mfu_causal / flops_per_token(case.config, case.sequence).causal
    low, high = (tokens / rate / 3600 for tokens in EPOCH)
    yield (
        f"projection, not measured: at this mfu_causal {CARDS} × A100 do {rate:,.0f} tokens/s ({CARDS} × "
        f"{PEAKS['A100'] / 1e12:.0f} TFLOP/s × {100 * row.mfu_causal:.1f} %), an epoch of {EPOCH[0] / 1e6:.0f} to "
        f"{EPOCH[1] / 1e6:.0f} million tokens takes {low:.2f} to {high:.2f} h (specified: {SPECIFIED_HOURS} h)"
    )
