"""Lock of a run's folder: only one job at a time."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ictx.errors import UserError
from ictx.train.ranks import on_first


@contextmanager
def locked(directory: Path, first: bool) -> Iterator[None]:
    """Locks a run's folder, which is created if missing; every rank calls it, the first one holds the lock.

    The system releases the lock whenever the process ends. Raises UserError if another job holds it.
    """
    descriptor = on_first(lambda: _lock(directory))
    try:
        yield
    finally:
        if first:
            os.close(descriptor)


def _lock(directory: Path) -> int:
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise UserError(
            f"run.dir {directory} is in use by {holder or 'another process'}: wait for its end, or use another run.dir"
        ) from error
    except OSError as error:
        print(f"{directory} cannot be locked ({error.strerror}): make sure that no other job uses it", flush=True)
        return descriptor
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError:  # for example a full disk: the lock is held nevertheless
        pass
    return descriptor
