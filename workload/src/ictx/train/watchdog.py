"""Detects hanging ranks: each rank reports its activity to the job's store; one that waits too long compares them."""

from __future__ import annotations

import faulthandler
import json
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import _get_default_store

from ictx.train.ranks import Ranks

REPORTS = 20
"""Reports per timeout."""
LAST = 2 / REPORTS
"""Share of the timeout reserved for the comparison, before the process group's own timeout ends the job."""


class Watchdog:
    """A thread beside the training loop; the loop reports each change of activity with `at`."""

    def __init__(self, ranks: Ranks, seconds: float, directory: Path) -> None:
        """Args: `seconds` without a report of the loop are a hang; traces are written to `directory`."""
        self.ranks, self.seconds, self.directory = ranks, seconds, directory
        self.verdict = ""
        """Description of the hang; empty if there is none."""
        self._moves, self._step, self._doing, self._since = 0, 0, "start", float("inf")
        self._reports = 0
        self._over = threading.Event()
        # A separate connection: the loop's blocks while a collective creates its group.
        self._store = _get_default_store().clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=seconds / REPORTS))
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def at(self, step: int, doing: str) -> None:
        """Records that the loop starts a part of a step; all ranks call it in the same order."""
        self._step, self._doing, self._since = step, doing, time.monotonic()
        self._moves += 1

    def rest(self) -> None:
        """Suspends the timeout."""
        self._since = float("inf")

    def close(self) -> None:
        """Stops the thread."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(self.seconds / REPORTS):
            try:
                self._report()
                if self._overdue:
                    self._look()
            except RuntimeError:  # errors of the store: its process has exited or hangs
                if self._overdue:
                    self._conclude(
                        f"the job's store, on the first rank or its torchrun, does not respond: {self._here()}"
                    )

    @property
    def _overdue(self) -> bool:
        return not self.verdict and time.monotonic() - self._since > self.seconds * (1 - 2 * LAST)

    def _report(self) -> None:
        self._reports += 1
        report = [socket.gethostname(), self._step, self._doing, self._moves, self._reports]
        self._store.set(f"ictx/watchdog/{self.ranks.rank}", json.dumps(report))

    def _here(self) -> str:
        return f"rank {self.ranks.rank} on {socket.gethostname()} is in {self._doing} of step {self._step}"

    def _reported(self) -> list[Any]:
        keys = [f"ictx/watchdog/{rank}" for rank in range(self.ranks.count)]
        return [
            json.loads(self._store.get(key)) if self._store.check([key]) else ["?", 0, "start", 0, 0] for key in keys
        ]

    def _look(self) -> None:
        """Compares all ranks' reports with those a little later."""
        moves, before = self._moves, self._reported()
        if self._over.wait(self.seconds * LAST):
            return
        self._report()
        after = self._reported()
        if moves != self._moves:
            return
        silent = [rank for rank in range(self.ranks.count) if after[rank] == before[rank]]
        front = max(report[3] for report in after)
        behind = silent or [rank for rank, report in enumerate(after) if report[3] < front]
        if not behind:
            self._conclude(f"all ranks wait in {self._doing} of step {self._step}")
            return
        places = [f"rank {rank} on {after[rank][0]} ({after[rank][2]} of step {after[rank][1]})" for rank in behind]
        verb = "does not respond" if silent else "is behind"
        self._conclude(f"{', '.join(places)} {verb}, and the others wait in {self._doing} of step {self._step}")

    def _conclude(self, who: str) -> None:
        """Prints which rank hangs, and writes this rank's stacks and flight recorder."""
        self.verdict = f"no progress for {self.seconds * (1 - LAST):.0f} s: {who} (train.timeout; {self.directory})"
        print(self.verdict, flush=True)
        name = f"rank-{self.ranks.rank:05}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with (self.directory / f"{name}.stacks").open("w") as file:
                faulthandler.dump_traceback(file)
            (self.directory / f"{name}.flight").write_bytes(flight_record(self.ranks.device))
        except OSError as error:
            print(f"cannot write {self.directory}: {error.strerror}", flush=True)


def flight_record(device: torch.device) -> bytes:
    """Returns the last collectives in the pickle format of PyTorch's flight recorder, which `torchfrtrace` reads."""
    bindings: Any = torch._C._distributed_c10d
    dump = bindings._dump_nccl_trace if device.type == "cuda" else bindings._dump_fr_trace
    return bytes(dump())
