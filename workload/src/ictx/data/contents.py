"""Content of a folder of prepared data, for any kind of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ictx.data import shards
from ictx.data.chat import files as chat
from ictx.data.progress import Progress
from ictx.manifest import Entry, Unusable, check_files, read_json


def read_meta(directory: Path) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Returns the content of meta.json and the files that it lists. Raises Unusable if it is not readable."""
    try:
        meta: Any = read_json(directory / shards.META_FILE)
    except Unusable as error:
        raise Unusable(f"{directory} holds no prepared data ({error}): run `ictx data prepare`") from error
    if isinstance(meta, dict) and "kind" in meta:
        meta = chat.read_meta(directory)
        return meta, chat.files_of(meta)
    meta = shards.read_meta(directory)
    return meta, shards.files_of(meta)


def verify(directory: Path) -> dict[str, Any]:
    """Verifies the checksums of all files; returns meta.json. Raises Unusable with the first file that differs."""
    meta, files = read_meta(directory)
    total = sum((directory / name).stat().st_size for name in files if (directory / name).exists())
    with Progress(f"verifying {directory}", total) as progress:
        try:
            check_files(directory, files, progress.add)
        except Unusable as error:
            raise Unusable(f"{error}: remove the folder and prepare it again") from error
    return meta
