"""Where a run is tracked besides MLflow, and under which name."""

from __future__ import annotations

from dataclasses import dataclass

from ictx.settings import shown

MODES = ("auto", "online", "offline", "disabled")


@dataclass(frozen=True)
class TrackConfig:
    """Names of a run in MLflow and in Weights & Biases (W&B), and how W&B gets it."""

    wandb: str = "auto"
    """`online`; `offline`: a folder in run.dir for `wandb sync`; `disabled`; `auto`: WANDB_MODE where it is set, else
    online where there is an API key, else offline, or disabled where the package is not installed."""
    project: str | None = None
    """W&B project; WANDB_PROJECT, else run.experiment, unless given."""
    entity: str | None = None
    """W&B user or team; WANDB_ENTITY, else the key's default, unless given."""
    group: str | None = None
    """Runs that W&B shows together, such as those of a sweep."""
    name: str | None = None
    """Of the run, in both; the number of the SLURM job, else the name of run.dir, unless given."""
    parent: str | None = None
    """Id of the MLflow run that this one is a part of, such as a sweep."""

    def __post_init__(self) -> None:
        if self.wandb not in MODES:
            raise ValueError(f"wandb is {shown(self.wandb)}: expected one of {', '.join(MODES)}")
        for name in ("project", "entity", "group", "name", "parent"):
            value = getattr(self, name)
            if value is not None and (not value.strip() or not value.isprintable() or len(value) > 128):
                raise ValueError(f"{name} is {shown(value)}: expected a name of at most 128 characters")


DEFAULTS = TrackConfig()
