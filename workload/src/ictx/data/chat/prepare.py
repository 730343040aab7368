"""Preparation of conversations or preferences: a folder of distinct rows for training and validation."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ictx import __version__
from ictx.data.chat import stdlib
from ictx.data.chat.config import ChatDataConfig
from ictx.data.chat.files import FORMAT, RowWriter, encoded
from ictx.data.chat.forms import READ, BadRow, prompt_of
from ictx.data.chat.records import Record
from ictx.data.corpus import Document, Seen
from ictx.data.progress import Progress
from ictx.data.publish import draft_in, held, publish
from ictx.data.shards import META_FILE, SPLITS
from ictx.data.skipped import Skipped
from ictx.data.sources import source
from ictx.errors import UserError, printable


def prepare(sources: Sequence[str | Path], out: Path, config: ChatDataConfig) -> Path:
    """Returns the folder below `out` with the rows prepared by `config`; creates it if it is missing.

    Args:
        sources: `stdlib`, and files, folders, pipes and data sets, as `ictx.data.sources.source` reads them.

    The folder's name is a hash of rows and settings, so that the same rows are stored only once. The folder is created
    atomically. Raises UserError naming a source, or the location of a bad row.
    """
    start = time.monotonic()
    names = sorted(map(str, sources))
    print(f"reading {', '.join(map(printable, names))}", flush=True)
    skipped, seen, repeated = Skipped(), Seen(), 0
    fingerprint = hashlib.sha256(json.dumps([config.identity(), FORMAT], sort_keys=True).encode())
    with draft_in(out) as draft, Progress("reading rows") as progress:
        writers = {split: RowWriter(draft, split) for split in SPLITS}
        for prompt, line in _rows(names, config, skipped):
            progress.add(len(line))
            digest = hashlib.sha256(line).digest()
            if not seen.add(digest):
                repeated += 1
                continue
            fingerprint.update(digest)
            share = Document.of(prompt).share(f"validation {config.seed}:")
            writers[SPLITS[share < config.validation_share]].add(line)
        splits = {split: writer.close() for split, writer in writers.items()}
        for report in skipped.lines():
            print(report, flush=True)
        if not all(entry["rows"] for entry in splits.values()):
            raise UserError(
                f"{', '.join(names)}: {sum(entry['rows'] for entry in splits.values())} usable rows are too few for a "
                f"validation share of {config.validation_share}: add rows or raise data.validation_share"
            )
        key = fingerprint.hexdigest()
        meta = {"ictx": __version__, "kind": config.kind, "format": FORMAT, "fingerprint": key}
        counts = {f"{unit}: {why}": count for (unit, why), count in skipped.counts.items()}
        meta |= {"splits": splits, "repeated": repeated, "skipped": counts, "settings": config.identity()}
        (draft / META_FILE).write_text(json.dumps(meta, indent=1) + "\n")
        directory = held(out, key[:16], key, config) or publish(draft, key[:16], key, config)
    train, validation = (splits[split]["rows"] for split in SPLITS)
    print(
        f"{directory}: {train:,} rows for training and {validation:,} for validation ({repeated:,} duplicates), "
        f"{time.monotonic() - start:.0f} s",
        flush=True,
    )
    return directory


def _rows(names: Sequence[str], config: ChatDataConfig, skipped: Skipped) -> Iterator[tuple[str, bytes]]:
    """Yields each row's prompt, and its line. Raises UserError naming a source without rows, or a bad row."""
    for name in names:
        empty = True
        for where, record in _records(name, config, skipped):
            empty = False
            try:
                if isinstance(record, BadRow):
                    raise record
                row = READ[config.kind](record)
            except BadRow as error:
                if config.bad_rows == "refuse":
                    raise UserError(f"{where}: {error} (data.bad_rows=drop skips such rows)") from error
                skipped.add(where, "row", error.why)
                continue
            line = encoded(row)
            if len(line) > config.longest_row:
                skipped.add(where, "row", f"longer than data.longest_row, {config.longest_row:,}")
                continue
            yield encoded({"prompt": prompt_of(row)}).decode(), line
        if empty:
            why = "; ".join(skipped.lines()) or "JSON lines, a JSON list or Parquet is expected"
            raise UserError(f"{name} is empty: it holds no rows ({why})")


def _records(name: str, config: ChatDataConfig, skipped: Skipped) -> Iterator[Record]:
    return stdlib.records(config.kind) if name == stdlib.STDLIB else source(name).records(config, skipped)
