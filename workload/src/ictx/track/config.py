"""Settings of tracking in MLflow and W&B."""

from __future__ import annotations

from dataclasses import dataclass

from ictx.settings import shown

MODES = ("auto", "online", "offline", "disabled")


@dataclass(frozen=True)
class TrackConfig:
    """Names of a run in MLflow and in Weights & Biases (W&B), and the mode of W&B."""

    wandb: str = "auto"
    """`online`; `offline`: a folder in run.dir for `wandb sync`; `disabled`; `auto`: WANDB_MODE if set, else online
    with an API key, else offline, or disabled if the package is not installed."""
    project: str | None = None
    """W&B project; default: WANDB_PROJECT, else run.experiment."""
    entity: str | None = None
    """W&B user or team; default: WANDB_ENTITY, else the key's default."""
    group: str | None = None
    """W&B group of runs, such as those of a sweep."""
    name: str | None = None
    """Name of the run in both; default: the number of the SLURM job, else the name of run.dir."""
    parent: str | None = None
    """Id of the parent MLflow run, such as a sweep's."""

    def __post_init__(self) -> None:
        if self.wandb not in MODES:
            raise ValueError(f"wandb is {shown(self.wandb)}: expected one of {', '.join(MODES)}")
        for name in ("project", "entity", "group", "name", "parent"):
            value = getattr(self, name)
            if value is not None and (not value.strip() or not value.isprintable() or len(value) > 128):
                raise ValueError(f"{name} is {shown(value)}: expected a name of at most 128 characters")


DEFAULTS = TrackConfig()
