"""Plots of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Needs no display. Figures are created without pyplot, which would keep all of them in memory.
matplotlib.use("Agg")


def _axes(title: str, across: str, up: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=across, ylabel=up)
    return figure, axes


def curve(file: Path, title: str, across: str, up: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Writes a line plot with a logarithmic axis of lengths or positions."""
    figure, axes = _axes(title, across, up)
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    figure.savefig(file, dpi=120)


def heat_map(file: Path, title: str, grid: Sequence[Mapping[str, float]], value: str) -> None:
    """Writes a heat map of needles: length on the x axis, depth on the y axis, from red (0) to green (1)."""
    lengths = sorted({cell["length"] for cell in grid})
    depths = sorted({cell["depth"] for cell in grid})
    figure, axes = _axes(title, "tokens", "depth of the needle")
    cells = {(cell["length"], cell["depth"]): cell[value] for cell in grid}
    rows = [[cells[length, depth] for length in lengths] for depth in depths]
    axes.imshow(rows, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            axes.text(column, row, f"{cells[length, depth]:.0%}", ha="center", va="center", fontsize=8)
    figure.savefig(file, dpi=120)


def bars(file: Path, title: str, up: str, values: Mapping[str, float]) -> None:
    """Writes a bar chart with one bar per name."""
    figure, axes = _axes(title, "", up)
    axes.bar(list(values), list(values.values()))
    axes.tick_params(axis="x", rotation=60)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(file, dpi=120)
