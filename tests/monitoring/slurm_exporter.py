"""SLURM's exporter as a module, and functions for its tests."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

from cluster import ROOT
from programs import loaded
from prometheus_client.parser import text_string_to_metric_families

FILES = ROOT / "roles/slurm_exporter/files"


def expand(nodes: str) -> list[str]:
    """Replaces ClusterShell's function, a package of the nodes, for names with at most one range."""
    found = re.fullmatch(r"(\w+)\[(\d+)-(\d+)\]", nodes)
    return [f"{found[1]}{n}" for n in range(int(found[2]), int(found[3]) + 1)] if found else [nodes]


def program() -> types.ModuleType:
    """Returns the program as a module, with its parts as the attributes `slurm` and `training`."""
    folder = types.ModuleType("ClusterShell")
    folder.NodeSet = types.ModuleType("ClusterShell.NodeSet")
    folder.NodeSet.expand = expand
    sys.modules |= {"ClusterShell": folder, "ClusterShell.NodeSet": folder.NodeSet}
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        return loaded(FILES / "bin/ictx-slurm-metrics")
    finally:
        sys.dont_write_bytecode = written


PROGRAM = program()


def written(metrics: Any, folder: Path) -> str:
    """Returns the file that the program writes, which must be valid and consist of printable lines."""
    file = folder / "slurm.prom"
    metrics.write(str(file), PROGRAM.SOURCES)
    text = file.read_bytes().decode()
    assert all(line.isprintable() for line in text.splitlines())
    assert text.endswith("\n")
    list(text_string_to_metric_families(text))
    return text


def values(metrics: Any) -> dict[str, float]:
    """Returns the samples as in the text format: `name{label="value"}` → value."""
    found = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def skipped(metrics: Any, folder: Path) -> dict[str, int]:
    """Returns the number of skipped rows of each source, without zeros."""
    written(metrics, folder)
    found = re.findall(r'ictx_slurm_skipped_rows\{source="(\w+)"\} ([\d.]+)', (folder / "slurm.prom").read_text())
    return {source: int(float(count)) for source, count in found if float(count)}
