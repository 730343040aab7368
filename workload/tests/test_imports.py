"""The package's import graph: no cycles, downwards only, and no heavy library before a command needs it."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import ictx

PACKAGE = Path(ictx.__file__).parent
ROOMS = (
    ("", "download", "errors", "folder", "manifest", "registry", "settings", "stopwatch", "version"),
    ("kernels", "data"),
    ("model",),
    ("infer", "metrics", "parallel", "track"),
    ("train",),
    ("bench", "doctor", "evaluate", "serve", "sweep", "torchtune"),
    ("cli",),
    ("__main__",),
)
"""From the bottom up: a subpackage imports itself and those below, not those of its level, except in the lowest.

A subpackage's `cli` belongs to the top: it only parses arguments, and imports other modules when a command runs.
"""


def modules() -> dict[str, Path]:
    """Returns each module's file."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        steps = file.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(steps[:-1] if steps[-1] == "__init__" else steps)] = file
    return found


def imports() -> dict[str, set[str]]:
    """Returns the imports of each module within the package, including those in functions and for types."""
    known = modules()
    graph = {}
    for name, file in known.items():
        wanted = set()
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                paths = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                wanted |= {path if path in known else node.module for path in paths.values()}
        graph[name] = wanted & set(known)
    return graph


def level(module: str) -> tuple[int, str]:
    """Returns the level of a module's subpackage, and the subpackage."""
    room = "cli" if module.endswith(".cli") else module.partition(".")[2].partition(".")[0]
    levels = [number for number, rooms in enumerate(ROOMS) if room in rooms]
    assert levels, f"{module}: add {room} to ROOMS"
    return levels[0], room


def test_there_are_no_circles() -> None:
    graph = imports()
    assert len(graph) > 100 and graph["ictx.kernels.decode.op"] >= {"ictx.kernels.dispatch"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" ← ".join(error.args[1])) from None


def test_rooms_import_downwards_only() -> None:
    upwards = []
    for module, wanted in imports().items():
        here, room = level(module)
        for other in wanted:
            there, its = level(other)
            if there > here or (there == here > 0 and its != room):
                upwards.append(f"{module} imports {other}")
    assert not upwards, "\n".join(sorted(upwards))


def test_help_needs_no_heavy_library() -> None:
    """Each of them takes a second or more to import."""
    code = "import sys, ictx.cli; ictx.cli.parser(); print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    )
    assert not loaded & {
        "torch",
        "triton",
        "numpy",
        "mlflow",
        "datasets",
        "pyarrow",
        "tokenizers",
        "jinja2",
        "optuna",
        "wandb",
    }
