"""The rows of docs/training.md that need several GPUs of one machine.

    python benchmarks/gpus.py four pairs --out FILE

Each case is a process group of its own with a time limit, so that one that hangs or finds no memory does not stop the
rest; what it found is a line of JSON in FILE as soon as it ends. Cases of two GPUs run side by side on a machine of
four. The package is found beside this file.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKLOAD = Path(__file__).parents[1]
LARGE = "--config ictx-1b --seq 32768 --steps 5"
STEADY = "--config ictx-1b --warm-up 1 --steps 1 --profile"
LONG = "--config ictx-1b --warm-up 0 --steps 1 --profile --cap 80"
RANK = "--config ictx-1b --simulate --warm-up 1 --steps 1"
CHECK = "--ranks 2 --cp 2 --check 1"


@dataclass(frozen=True)
class Case:
    """What runs."""

    gpus: int
    limit: int
    """Seconds."""
    arguments: str

    @property
    def command(self) -> list[str]:
        """Its command line."""
        return [sys.executable, "-m", "ictx", "bench", "train", *self.arguments.split()]


SETS: dict[str, dict[str, Case]] = {
    # Issue 20: four ranks at 32k; 36 GB are what an A100 of 40 GB has room for.
    "four": {
        "fsdp 4, cap 36": Case(4, 150, f"{LARGE} --ranks 4 --compile --profile --cap 36"),
        "cp 2 x fsdp 2": Case(4, 120, f"{LARGE} --ranks 4 --cp 2 --compile --profile --cap 36"),
        "hsdp 2 x 2": Case(4, 120, f"{LARGE} --ranks 4 --replicate 2 --compile --profile --cap 36"),
        "ddp 4": Case(4, 120, f"{LARGE} --ranks 4 --compile --profile --recompute --ddp"),
        "transformers, compiled": Case(4, 150, f"{LARGE} --ranks 4 --compile --recompute --peer"),
        "fsdp 4, 8 layers kept, cap 36": Case(4, 100, f"{LARGE} --ranks 4 --compile --layers 8 --cap 36"),
        "cp 4": Case(4, 100, f"{LARGE} --ranks 4 --cp 4 --compile --profile --cap 36"),
    },
    # The windows of four ranks on two; context parallelism's gradients.
    "pairs": {
        "cp 2, bfloat16": Case(2, 120, f"--config ictx-1b --seq 8192 {CHECK}"),
        "cp 2, float32": Case(2, 150, f"--config ictx-1b --seq 4096 {CHECK} --dtype float32"),
        "fsdp 2, two windows": Case(2, 120, f"{LARGE} --ranks 2 --batch 2 --compile --cap 80"),
        "cp 2 of 2": Case(2, 100, f"{LARGE} --ranks 2 --cp 2 --compile --profile --cap 36"),
        "cp 2, 131072": Case(2, 150, f"{LONG} --seq 131072 --ranks 2 --cp 2 --warm-up 1"),
    },
    # What `auto` chooses beside what it then takes; linear products in fp8 (requirements/cuda-fp8.txt); exchanges that
    # overlap with attention, beside `pairs` at an earlier commit.
    "options": {
        "auto, cap 36": Case(2, 100, f"{LARGE} --ranks 2 --compile --recompute auto --cap 36"),
        "auto, cap 76": Case(2, 100, f"{LARGE} --ranks 2 --compile --recompute auto --cap 76"),
        "auto, 8192": Case(
            2, 100, "--config ictx-1b --seq 8192 --steps 5 --ranks 2 --compile --recompute auto --cap 36"
        ),
        "none": Case(2, 100, f"{LARGE} --ranks 2 --compile --recompute none"),
        "none, fp8 tensorwise": Case(2, 150, f"{LARGE} --ranks 2 --compile --recompute none --fp8 tensorwise"),
        "none, fp8 rowwise": Case(2, 150, f"{LARGE} --ranks 2 --compile --recompute none --fp8 rowwise"),
        "cp 2 of 2": Case(2, 100, f"{LARGE} --ranks 2 --cp 2 --compile --profile --cap 36"),
        "cp 2, float32": Case(2, 150, f"--config ictx-1b --seq 4096 {CHECK} --dtype float32"),
        "cp 2, bfloat16": Case(2, 120, f"--config ictx-1b --seq 8192 {CHECK}"),
    },
    # Issue 15: the longest context on two GPUs of 80 GB. The million takes six to seven minutes.
    "million": {
        "cp 2, 1048576, offload": Case(2, 560, f"{LONG} --seq 1048576 --ranks 2 --cp 2 --offload"),
        "cp 2, 524288": Case(2, 220, f"{LONG} --seq 524288 --ranks 2 --cp 2"),
        "cp 2, 524288, cap 40, offload": Case(2, 240, f"{LONG} --seq 524288 --ranks 2 --cp 2 --offload --cap 40"),
    },
    "million4": {
        "cp 4, 1048576": Case(4, 300, f"{LONG} --seq 1048576 --ranks 4 --cp 4"),
        "cp 4, 1048576, offload, cap 36": Case(4, 300, f"{LONG} --seq 1048576 --ranks 4 --cp 4 --offload --cap 36"),
    },
    # Issue 21: a million tokens on eight, and a quarter of them on two.
    "two": {
        "cp 2, 262144": Case(2, 150, f"{STEADY} --seq 262144 --ranks 2 --cp 2 --cap 78"),
        "cp 2, 262144, full, cap 36": Case(2, 180, f"{STEADY} --seq 262144 --ranks 2 --cp 2 --recompute full --cap 36"),
        "cp 2, 262144, offload, cap 36": Case(2, 170, f"{STEADY} --seq 262144 --ranks 2 --cp 2 --offload --cap 36"),
        "cp 2, 524288": Case(2, 300, f"{STEADY} --seq 524288 --ranks 2 --cp 2 --cap 78"),
    },
    "eight": {
        "cp 8, 1048576": Case(8, 200, f"{LONG} --seq 1048576 --ranks 8 --cp 8 --cap 78"),
        "cp 8, 1048576, full, cap 36": Case(8, 240, f"{LONG} --seq 1048576 --ranks 8 --cp 8 --recompute full --cap 36"),
        "cp 4 x fsdp 2, 1048576": Case(8, 300, f"{LONG} --seq 1048576 --ranks 8 --cp 4 --cap 78"),
        "cp 4 x fsdp 2, 1048576, offload, cap 36": Case(
            8, 300, f"{LONG} --seq 1048576 --ranks 8 --cp 4 --offload --cap 36"
        ),
        "fsdp 8": Case(8, 100, f"{LARGE} --ranks 8 --compile --profile --cap 78"),
        "hsdp 2 x 4": Case(8, 100, f"{LARGE} --ranks 8 --replicate 2 --compile --profile --cap 78"),
    },
    # One rank of `two` and of `eight` on one GPU. The first case is measured in `two`: the difference is communication.
    "rank": {
        "cp 2, 262144": Case(1, 120, f"{RANK} --seq 262144 --ranks 2 --cp 2 --cap 78"),
        "cp 8, 1048576": Case(1, 300, f"{RANK} --seq 1048576 --ranks 8 --cp 8 --cap 78"),
    },
    "rank8": {
        "cp 8, 1048576, offload, cap 36": Case(1, 300, f"{RANK} --seq 1048576 --ranks 8 --cp 8 --offload --cap 36"),
        "cp 8, 1048576, full, cap 36": Case(1, 340, f"{RANK} --seq 1048576 --ranks 8 --cp 8 --recompute full --cap 36"),
        "cp 4 x fsdp 2, 1048576": Case(1, 420, f"{RANK} --seq 1048576 --ranks 8 --cp 4 --cap 78"),
        "cp 4 x fsdp 2, 1048576, full": Case(
            1, 480, f"{RANK} --seq 1048576 --ranks 8 --cp 4 --recompute full --cap 78"
        ),
        "fsdp 8": Case(1, 60, f"{LARGE} --ranks 8 --compile --simulate --cap 78"),
        "hsdp 2 x 4": Case(1, 60, f"{LARGE} --ranks 8 --replicate 2 --compile --simulate --cap 78"),
    },
    # Gradients in float32 take minutes: about 15 TFLOP/s a GPU.
    "check2": {
        "cp 2 against 1, 32768, float32": Case(2, 200, f"--config ictx-1b --seq 32768 {CHECK} --dtype float32"),
    },
    "check8": {
        "cp 8 against 2, 65536, float32": Case(
            8, 560, "--config ictx-1b --seq 65536 --ranks 8 --cp 8 --check 2 --dtype float32"
        ),
    },
    # The whole way on two processes without a GPU.
    "try": {
        "small": Case(2, 200, "--config tiny --seq 512 --ranks 2 --cp 2 --steps 1 --warm-up 0"),
        "too late": Case(2, 1, "--config tiny --seq 512 --ranks 2"),
    },
}


class Results:
    """The file of results: a line a case, on the disk when `add` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.lock = path, threading.Lock()

    def add(self, line: dict[str, Any]) -> None:
        """Adds a line, and prints what it is about."""
        with self.lock, self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
            print(f"{line['case']}: {line['status']} in {line['seconds']:.0f} s\n{line['output']}", flush=True)


def attempt(name: str, case: Case, gpus: str, limit: float, results: Results) -> None:
    """Runs a case on some GPUs and adds its line."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Path(folder, "output").open("w+") as output:
        rows = Path(folder) / "rows.json"
        paths = os.pathsep.join(filter(None, (str(WORKLOAD / "src"), os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            [*case.command, "--out", str(rows)],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=WORKLOAD,
            start_new_session=True,
        )
        try:
            status = f"exit {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            status = f"ended after its limit of {limit:.0f} s"
        finally:
            # Ranks outlive a launcher that was killed.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        results.add(
            {
                "case": name, "command": case.arguments, "gpus": gpus, "status": status,
                "seconds": time.monotonic() - begun, "output": output.read()[-3000:],
                "rows": json.loads(rows.read_text()) if rows.exists() else [],
            }
        )  # fmt: skip


def count_gpus() -> int:
    """Returns how many GPUs this machine has."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return len(listed.stdout.splitlines())


def run(cases: dict[str, Case], until: float, results: Results) -> None:
    """Runs the cases of a set, as many side by side as there are GPUs for."""
    each = max(case.gpus for case in cases.values())
    groups: queue.Queue[str] = queue.Queue()
    for group in range(max(count_gpus() // each, 1)):
        groups.put(",".join(str(group * each + place) for place in range(each)))

    def one(name: str, case: Case) -> None:
        gpus = groups.get()
        try:
            left = until - time.monotonic()
            if left < min(case.limit / 3, 60):
                results.add({"case": name, "status": "no time left", "seconds": 0.0, "output": "", "rows": []})
            else:
                attempt(name, case, gpus, min(case.limit, left), results)
        finally:
            groups.put(gpus)

    with ThreadPoolExecutor(groups.qsize()) as pool:
        for future in [pool.submit(one, name, case) for name, case in cases.items()]:
            future.result()


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Returns nested values by their path, without what is empty."""
    if isinstance(value, dict):
        parts = [flat(part, f"{key}.{name}".lstrip(".")) for name, part in value.items()]
        return {name: part for found in parts for name, part in found.items()}
    if isinstance(value, list):
        return {key: " ".join(map(str, value))} if value else {}
    return {} if value in (None, "") else {key: value}


def save_csv(lines: Path, path: Path) -> None:
    """Writes what was measured so far as a table: a line for each row of each case."""
    rows = []
    for line in lines.read_text("utf-8").splitlines():
        case = json.loads(line)
        rows += [{"case": case["case"], "command": case["command"], **flat(row)} for row in case["rows"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, names, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def main() -> None:
    """Runs the sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=SETS, help="which cases, in turn")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="gets JSON lines; FILE's name with .csv a table"
    )
    parser.add_argument("--seconds", type=float, default=580, metavar="N", help="time for all (580)")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases with this in their name")
    arguments = parser.parse_args()
    until, results = time.monotonic() + arguments.seconds, Results(arguments.out)
    for name in arguments.sets:
        cases = {case: what for case, what in SETS[name].items() if arguments.only in case}
        if cases:
            run(cases, until, results)
    save_csv(arguments.out, arguments.out.with_suffix(".csv"))


if __name__ == "__main__":
    main()
