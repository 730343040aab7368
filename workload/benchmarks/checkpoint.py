"""Cost of a checkpoint's checksums: writing with and without them, verifying, and loading.

python benchmarks/checkpoint.py FOLDER [GIGABYTES]: prints seconds of wall clock and of CPU, the best of three each.
"""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from ictx.manifest import check_files, read
from ictx.train.checkpoint import Checkpoints, finite
from ictx.train.storage import HashingWriter

WEIGHTS = 1 << 24


def timed(what: str, call: Callable[[], object], draft: Path) -> None:
    best = []
    for _ in range(3):
        shutil.rmtree(draft, ignore_errors=True)
        processor, wall = time.process_time(), time.monotonic()
        call()
        best.append((time.monotonic() - wall, time.process_time() - processor))
    wall, processor = map(min, zip(*best, strict=True))
    print(f"{what:<40} {wall:6.2f} s, CPU {processor:6.2f} s", flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    folder, gigabytes = Path(sys.argv[1]) / "checkpoint-bench", float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    count = max(int(gigabytes * 1e9 / 4 / WEIGHTS), 1)
    state = {"model": {f"weight-{number}": torch.randn(WEIGHTS) for number in range(count)}}
    print(f"{count * WEIGHTS * 4 / 1e9:.2f} GB in {folder}")
    checkpoints, draft = Checkpoints(folder / "run" / "checkpoints", keep=1), folder / "draft"
    try:
        timed("write", lambda: save(state, storage_writer=FileSystemWriter(draft)), draft)
        timed("write and hash", lambda: save(state, storage_writer=HashingWriter(draft)), draft)
        timed("check for non-finite numbers", lambda: finite(state), draft)
        path = checkpoints.save(1, state)
        timed("verify", lambda: check_files(path, read(path)), draft)
        timed("verify and load", lambda: checkpoints.load_newest(state), draft)
    finally:
        shutil.rmtree(folder)
        dist.destroy_process_group()


main()
