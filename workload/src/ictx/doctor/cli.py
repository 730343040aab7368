"""The command line: `ictx doctor`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

EXAMPLES = """
Exit status: 0, or 1 if training or serving would fail.

examples:
  ictx doctor
  ictx doctor --dir /shared/runs/alice --json
  srun --jobid=JOB --overlap /opt/ictx/bin/ictx doctor      # in a running job's environment
"""


def register(areas: Any) -> None:
    """Adds the command to `ictx`."""
    doctor = areas.add_parser(
        "doctor",
        help="check this machine's or job's environment",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument("--dir", type=Path, default=Path(), help="folder for runs (default: the current folder)")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(run=run_doctor)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Runs `ictx doctor`; returns 1 if a check fails."""
    from ictx.doctor.checks import Level, checks

    findings = [(name, found) for name, check in checks(arguments.dir.resolve()).items() for found in check()]
    if arguments.json:
        print(
            json.dumps(
                [{"check": name, **found._asdict(), "level": found.level.value} for name, found in findings], indent=1
            )
        )
    else:
        for name, found in findings:
            print(f"{found.level.value:4}  {name:9} {found.text}")
            if found.remedy:
                print(f"{'':16}→ {found.remedy}")
    return int(any(found.level is Level.FAIL for _, found in findings))
