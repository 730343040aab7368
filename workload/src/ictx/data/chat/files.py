"""Prepared conversations and preferences on disk: one file of JSON lines for each split, and meta.json.

`train.jsonl` and `validation.jsonl` are UTF-8 with one JSON object per line, all of one kind (`kind` in meta.json).
`sft`: `{"messages": [{"role": …, "content": …}, …]}`, ending with an answer. `dpo`:
`{"prompt": [MESSAGE, …], "chosen": [MESSAGE, …], "rejected": [MESSAGE, …]}`, TRL's conversational format. Roles are
system, user, assistant and tool, in an order that templates accept; contents are text. Rows are not tokenized, because
tokens depend on the model that is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from ictx.data.chat.config import Kind
from ictx.data.chat.forms import Row
from ictx.data.shards import META_FILE, SPLITS, SplitName
from ictx.manifest import Entry, Unusable, is_sha256, read_json
from ictx.settings import shown

FORMAT = 1


class RowWriter:
    """Writes a split."""

    def __init__(self, directory: Path, split: SplitName) -> None:
        """Creates the file, empty."""
        self.rows, self.bytes, self._sha256 = 0, 0, hashlib.sha256()
        self._file = (directory / f"{split}.jsonl").open("wb")

    def add(self, line: bytes) -> None:
        """Appends a row, as `encoded` returns it."""
        self.rows, self.bytes = self.rows + 1, self.bytes + len(line)
        self._file.write(line)
        self._sha256.update(line)

    def close(self) -> dict[str, Any]:
        """Returns the split's entry in meta.json."""
        self._file.close()
        return {"rows": self.rows, "bytes": self.bytes, "sha256": self._sha256.hexdigest()}


def encoded(row: Row) -> bytes:
    """Returns a row's line; equal rows have equal bytes on all machines."""
    return (json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def read_meta(directory: Path, kind: Kind | None = None) -> dict[str, Any]:
    """Returns the content of meta.json. Raises Unusable if it is missing, invalid, or of another kind."""
    try:
        meta: Any = read_json(directory / META_FILE)
    except Unusable as error:
        raise Unusable(f"{directory} holds no prepared data ({error}): run `ictx data prepare`") from error
    found = meta.get("kind", "pretrain") if isinstance(meta, dict) else meta
    if found not in ("sft", "dpo") or (kind and found != kind):
        raise Unusable(f"{directory} holds {shown(found)} data, not {kind or 'sft or dpo'}: run `ictx data prepare`")
    if meta.get("format") != FORMAT:
        raise Unusable(f"{directory} has format {shown(meta.get('format'))}, but this version reads {FORMAT}")
    splits = meta.get("splits")
    whole = isinstance(meta.get("fingerprint"), str) and isinstance(splits, dict) and set(splits) == set(SPLITS)
    if not whole or not all(map(_is_entry, splits.values())):
        raise Unusable(f"{directory / META_FILE} is invalid for {FORMAT=}: run `ictx data prepare`")
    return cast("dict[str, Any]", meta)


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and is_sha256(entry.get("sha256"))
        and all(type(entry.get(name)) is int and 0 < entry[name] < 1 << 63 for name in ("rows", "bytes"))
    )


def files_of(meta: dict[str, Any]) -> dict[str, Entry]:
    """Returns the files that meta.json lists."""
    return {f"{split}.jsonl": Entry(entry["sha256"], entry["bytes"]) for split, entry in meta["splits"].items()}


def read_rows(directory: Path, split: SplitName) -> Iterator[Row]:
    """Yields the rows of a split in order; checksums are verified before, by `ictx.train.prepared.checked`."""
    with (directory / f"{split}.jsonl").open("rb") as file:
        for line in file:
            yield json.loads(line)
