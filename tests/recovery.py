"""Records of drills: tests with `@pytest.mark.drill(fault, keeps=…, acts=…)` and the fixture `drill`.

The marker gives the fault, the data that must be kept, and the repair: "nobody" (automatic) or one documented command.
The fixture measures the recovery time. Each test appends a line to RECORDS, from which `scripts/drills` writes a page.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = Path(os.environ.get("ICTX_CACHE", Path.home() / ".cache/ictx")) / "suites/drills.jsonl"


@dataclass
class Drill:
    """Measures the recovery times of a drill."""

    seconds: list[float] = field(default_factory=list)
    """Seconds from each fault to the recovery."""

    @contextmanager
    def recovery(self) -> Iterator[None]:
        """Measures the time from the fault, at the start of the block, to the recovery of the service, at its end."""
        began = time.monotonic()
        yield
        self.seconds.append(time.monotonic() - began)


def commit() -> str:
    """Returns the tested commit, with a mark if the tree differs from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def record(file: Path, faults: list[str], passed: bool, seconds: list[float]) -> None:
    """Appends a line for each fault of a test, with the longest of its recovery times."""
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "passed": passed,
        "seconds": round(max(seconds)) if seconds else None,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }
    with file.open("a") as lines:
        lines.writelines(json.dumps({"fault": fault, **about}) + "\n" for fault in faults)
