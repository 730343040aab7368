"""What a drill records: `@pytest.mark.drill(fault, keeps=…, acts=…)` on a test, and the fixture `drill` in it.

The marker names the fault, what must not be lost, and who acts: "nobody", or one documented command. The fixture
measures the time to recover. Each run of such a test appends a line to RECORDS; `scripts/drills` makes a page of them.
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
    """The clock of a drill."""

    seconds: list[float] = field(default_factory=list)
    """Each time from a fault to the recovery."""

    @contextmanager
    def recovery(self) -> Iterator[None]:
        """Measures: from the fault, at the beginning of the block, to the service that is back, at its end."""
        began = time.monotonic()
        yield
        self.seconds.append(time.monotonic() - began)


def commit() -> str:
    """Returns the commit that is tested, marked where the tree differs from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def record(file: Path, faults: list[str], passed: bool, seconds: list[float]) -> None:
    """Appends a line for each fault of a test that ran; of several times the longest counts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "passed": passed,
        "seconds": round(max(seconds)) if seconds else None,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }
    with file.open("a") as lines:
        lines.writelines(json.dumps({"fault": fault, **about}) + "\n" for fault in faults)
