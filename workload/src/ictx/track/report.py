"""Plots of a run, drawn from its records."""

from __future__ import annotations

from pathlib import Path

from ictx.track.records import read_records


def write_report(directory: Path) -> list[Path]:
    """Writes report/loss.png of the run in `directory`; returns the written files, none for a run without a loss.

    Losses of training and validation and the learning rate, over steps.
    """
    # Imported here because it takes a second, and only one rank needs it at the end.
    from matplotlib.figure import Figure

    records = read_records(directory / "metrics.jsonl")
    loss, validation, rate = (
        [(record["step"], record[name]) for record in records if name in record]
        for name in ("loss", "validation_loss", "learning_rate")
    )
    if not loss:
        return []
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    losses.plot(*zip(*loss, strict=True), label="training", linewidth=1)
    if validation:
        losses.plot(*zip(*validation, strict=True), label="validation", marker=".")
    losses.set(ylabel="loss", title=directory.name)
    losses.legend()
    losses.grid(alpha=0.3)
    if rate:
        rates.plot(*zip(*rate, strict=True), color="tab:gray", linewidth=1)
    rates.set(xlabel="step", ylabel="learning rate")
    rates.grid(alpha=0.3)
    path = directory / "report" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".part.png")
    figure.savefig(draft, dpi=100)
    draft.replace(path)
    return [path]
