"""Publication of prepared data: creates its folder atomically, once, and reuses it only from a trusted owner."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ictx.data.contents import verify
from ictx.data.trust import Trusting, trusted_files
from ictx.errors import UserError
from ictx.folder import sync
from ictx.manifest import Unusable

# Unchanged folders of this age are considered abandoned.
STALE_SECONDS = 24 * 3600


def held(out: Path, name: str, fingerprint: str, config: Trusting) -> Path | None:
    """Returns an existing folder with the data, and reports it; None without one: see `_held`."""
    _remove_stale(out)
    found = _held(out, name, fingerprint, config)
    if found:
        print(f"{found} holds this corpus already: nothing to do", flush=True)
    return found


@contextmanager
def draft_in(out: Path) -> Iterator[Path]:
    """Yields a new folder below `out` for `publish`; it is removed if it is not published.

    Raises UserError if it cannot be written.
    """
    # Not named by process id, which may be equal in containers of different nodes and jobs.
    draft = out / f".{uuid.uuid4().hex}.part"
    try:
        out.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        yield draft
    except OSError as error:
        raise UserError(f"cannot write {error.filename or draft}: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, name: str, fingerprint: str, config: Trusting) -> Path:
    """Syncs a draft to disk and renames it to its final name; returns the folder to use."""
    # Independent of the umask: prepared data is readable by everyone, and writable only by its owner.
    for path in [*draft.iterdir(), draft]:
        path.chmod(0o755 if path == draft else 0o644)
        sync(path)
    directory = _named(draft, name, fingerprint, config)
    sync(draft.parent)
    return directory


def _held(out: Path, name: str, fingerprint: str, config: Trusting) -> Path | None:
    """Returns an existing folder with the corpus whose owner is trusted and whose files match the manifest.

    If others can write to `out`, one of them may occupy the name; this user's folder then has a longer name.
    """
    not_trusted = 0
    for path in sorted(out.glob(f"{name}*")):
        try:
            trusted_files(path, config)
        except (Unusable, OSError) as error:
            not_trusted += 1
            if not_trusted == 1:
                print(f"not used: {error}", flush=True)
            continue
        try:
            if verify(path)["fingerprint"] == fingerprint:
                return path
        except (Unusable, OSError) as error:
            print(f"not used: {error}", flush=True)
    if not_trusted > 1:
        print(f"not used for similar reasons: {not_trusted - 1} more folders with this name", flush=True)
    return None


def _named(draft: Path, name: str, fingerprint: str, config: Trusting) -> Path:
    """Renames a draft to its name, or to an unguessable one if that exists; returns the folder to use."""
    try:
        return draft.rename(draft.parent / name)
    except OSError:
        # Another job published the same corpus first, or another user occupies the name.
        if found := _held(draft.parent, name, fingerprint, config):
            return found
        return draft.rename(draft.parent / f"{name}-{uuid.uuid4().hex[:12]}")


def _remove_stale(out: Path) -> None:
    """Removes remains of this user's killed runs."""
    for left in out.glob(".*.part"):
        with suppress(OSError):
            if left.lstat().st_uid != os.geteuid():
                continue
            # The folder of a run that takes days is old too, but the files that it writes are not.
            newest = max(path.lstat().st_mtime for path in [left, *left.glob("*")])
            if time.time() - newest > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
