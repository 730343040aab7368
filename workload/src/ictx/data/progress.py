"""Progress of long operations: a bar on a terminal, else a line at intervals."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

# Seconds between lines in a job's log.
PAUSE = 10.0


class Progress:
    """Counts bytes, or another `unit`. Without a total, share and remaining time are not shown."""

    def __init__(self, what: str, total: int | None = None, unit: str = "B") -> None:
        """Starts at 0."""
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self.began = self.printed = time.monotonic()
        terminal = sys.stderr.isatty()
        self.bar = tqdm(desc=what, total=total, unit=unit, unit_scale=True, file=sys.stderr) if terminal else None

    def add(self, count: int) -> None:
        """Counts `count` more units."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() - self.printed > PAUSE:
            self.printed = time.monotonic()
            rate = self.done / (self.printed - self.began)
            share = f" ({min(self.done / self.total, 1):.0%})" if self.total else ""
            if self.unit == "B":
                print(f"{self.what}: {self.done / 1e6:,.0f} MB{share}, {rate / 1e6:.1f} MB/s", flush=True)
                return
            left = f", {(self.total - self.done) / rate:,.0f} s left" if self.total and rate else ""
            print(f"{self.what}: {self.done:,} {self.unit}{share}, {rate:,.0f} {self.unit}/s{left}", flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
