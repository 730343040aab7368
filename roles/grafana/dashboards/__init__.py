"""The dashboards, one module each, built with Grafana's Foundation SDK. scripts/dashboards writes their JSON."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard

from . import fleet, gpu, kubernetes, models, nodes, serving, slurm, training

MODULES = (fleet, slurm, gpu, training, serving, kubernetes, nodes, models)


def build() -> dict[str, Dashboard]:
    """Returns every dashboard by the name of its module; panels are numbered, so that links remain valid."""
    made = {module.__name__.rpartition(".")[2]: module.build().build() for module in MODULES}
    for dashboard in made.values():
        for number, panel in enumerate(dashboard.panels or [], start=1):
            panel.id_val = number
    return made
