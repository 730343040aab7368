"""A corpus becomes a folder: a tokenizer, and shards of tokens for training and for validation."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ictx import __version__
from ictx.data.config import DataConfig
from ictx.data.corpus import Corpus, Summary
from ictx.data.encode import encoded
from ictx.data.progress import Progress
from ictx.data.shards import FORMAT, META_FILE, SPLITS, SplitWriter, verify
from ictx.data.tokenizer import (
    END_OF_TEXT,
    SPECIAL_TOKENS,
    TOKENIZER_FILES,
    added_around,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from ictx.data.trust import trusted_files
from ictx.errors import UserError, printable
from ictx.folder import sync
from ictx.manifest import Unusable, digest

# Folders that nothing was added to for so long are not being written any more.
STALE_SECONDS = 24 * 3600


def prepare(sources: Sequence[str | Path], out: Path, config: DataConfig) -> Path:
    """Returns the folder below `out` that holds the corpus prepared as `config` says; makes it unless it is there.

    Args:
        sources: files, folders and data sets, as `ictx.data.sources.source` reads them.

    The folder's name follows the text and the settings, so the same corpus is prepared once. It appears complete or
    not at all. Raises UserError naming a path, or the folder when its disk is full.
    """
    start = time.monotonic()
    given = load_tokenizer(config.tokenizer, config.vocab_size) if config.tokenizer else None
    names = [str(source) for source in sources]
    print(f"reading {', '.join(map(printable, names))}", flush=True)
    corpus = Corpus(names, config)
    found = corpus.scan()
    chosen = hashlib.sha256(described(given).encode()).hexdigest() if given else None
    identity = [found.fingerprint, config.identity(), chosen, FORMAT]
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    name = fingerprint[:16]
    print(
        f"corpus: {found.documents:,} distinct documents, {found.bytes / 1e6:.1f} MB of text "
        f"({found.repeated:,} were there twice)",
        flush=True,
    )
    for line in found.skipped:
        print(line, flush=True)
    _remove_stale(out)
    if held := _held(out, name, fingerprint, config):
        print(f"{held} holds this corpus already: nothing to do", flush=True)
        return held
    # No process number: in containers of every node and of every job it is the same.
    draft = out / f".{name}.{uuid.uuid4().hex[:12]}.part"
    try:
        out.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        tokenizer = given or _trained(corpus, found, config)
        save_tokenizer(tokenizer, draft)
        print(f"tokenizer: {tokenizer.get_vocab_size():,} entries, {time.monotonic() - start:.0f} s", flush=True)
        meta = write_tokens(corpus, found, tokenizer, draft, config)
        sums = {name: digest(draft / name).sha256 for name in TOKENIZER_FILES}
        about = {"ictx": __version__, "format": FORMAT, "fingerprint": fingerprint, "sha256": sums}
        (draft / META_FILE).write_text(json.dumps({**about, **meta}, indent=1) + "\n")
        # Whatever the umask is: everybody may read what is prepared, and its owner alone may change it.
        for path in [*draft.iterdir(), draft]:
            path.chmod(0o755 if path == draft else 0o644)
        for path in (*(draft / name for name in (*TOKENIZER_FILES, META_FILE)), draft):
            sync(path)
        directory = _named(draft, name, fingerprint, config)
        sync(out)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or draft}: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(
        f"{directory}: {meta['train_tokens']:,} training and {meta['validation_tokens']:,} validation tokens, "
        f"unigram entropy {meta['unigram_entropy']:.3f} nats, {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return directory


def described(tokenizer: Tokenizer) -> str:
    """Returns what tells a tokenizer from others; one that puts tokens around texts once put them around pieces."""
    around = added_around(tokenizer)
    return str(tokenizer.to_str()) + (repr(around) if any(around) else "")


def _held(out: Path, name: str, fingerprint: str, config: DataConfig) -> Path | None:
    """Returns a folder that holds the corpus: of somebody who is trusted, every file of it what was written.

    Where others can write too, anybody may have taken the name: then this user's folder has a longer one.
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
        print(f"not used for such reasons: {not_trusted - 1} more folders with this name", flush=True)
    return None


def _named(draft: Path, name: str, fingerprint: str, config: DataConfig) -> Path:
    """Gives a draft its name, or one that nobody can guess where that is taken; returns the folder to use."""
    try:
        return draft.rename(draft.parent / name)
    except OSError:
        # Another job was quicker with the same text, or somebody keeps others from using the name.
        if held := _held(draft.parent, name, fingerprint, config):
            return held
        return draft.rename(draft.parent / f"{name}-{uuid.uuid4().hex[:12]}")


def _remove_stale(out: Path) -> None:
    """Removes what killed runs of this user left: they cannot tidy up themselves."""
    for left in out.glob(".*.part"):
        with suppress(OSError):
            if left.lstat().st_uid != os.geteuid():
                continue
            # The folder of a run that takes days is as old, but what it writes to is not.
            newest = max(path.lstat().st_mtime for path in [left, *left.glob("*")])
            if time.time() - newest > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)


def _trained(corpus: Corpus, found: Summary, config: DataConfig) -> Tokenizer:
    """Returns a tokenizer of the corpus, or of a sample of it that is as large as `tokenizer_bytes`."""
    share = config.tokenizer_bytes / max(found.bytes, 1)
    salt = f"tokenizer {config.seed}:"
    with Progress("training the tokenizer", min(found.bytes, config.tokenizer_bytes)) as progress:

        def sample() -> Any:
            for document in corpus.documents():
                if document.share(salt) < share:
                    progress.add(document.bytes)
                    yield document.text

        return train_tokenizer(sample(), config.vocab_size)


def write_tokens(
    corpus: Corpus, found: Summary, tokenizer: Tokenizer, directory: Path, config: DataConfig
) -> dict[str, Any]:
    """Writes the shards of both splits and returns what is to be known of them. Raises UserError."""
    dtype = np.dtype("<u2" if config.vocab_size <= 1 << 16 else "<u4")
    counts = {split: np.zeros(config.vocab_size, np.int64) for split in SPLITS}
    shares = {"train": 1 - config.validation_share, "validation": config.validation_share}
    writers = {
        split: SplitWriter(directory, split, -(-int(found.bytes * shares[split]) // config.shard_bytes) or 1)
        for split in SPLITS
    }
    fingerprint = hashlib.sha256()
    with Progress("tokenising", found.bytes) as progress:
        for document, tokens in encoded(tokenizer, corpus.documents(), dtype):
            fingerprint.update(document.digest)
            split = SPLITS[document.share(f"validation {config.seed}:") < config.validation_share]
            counts[split] += np.bincount(tokens, minlength=config.vocab_size)
            writers[split].add(tokens, document.digest)
            progress.add(document.bytes)
    if fingerprint.hexdigest() != found.fingerprint:
        raise UserError(f"the corpus ({', '.join(map(str, corpus.sources))}) changed while it was read: run again")
    splits = {split: writer.close() for split, writer in writers.items()}
    if not all(splits.values()):
        raise UserError(
            f"the corpus has too few documents for a validation share of {config.validation_share}: add text or raise "
            "data.validation_share"
        )
    return {
        "vocab_size": config.vocab_size,
        "dtype": dtype.str,
        "end_of_text": [0, END_OF_TEXT],
        "special_tokens": dict(zip(SPECIAL_TOKENS, range(len(SPECIAL_TOKENS)), strict=True)),
        "corpus_bytes": found.bytes,
        **{f"{split}_tokens": int(count.sum()) for split, count in counts.items()},
        "unigram_entropy": unigram_entropy(counts["train"], counts["validation"]),
        "settings": config.identity(),
        "splits": splits,
    }


def unigram_entropy(train: npt.NDArray[np.int64], validation: npt.NDArray[np.int64]) -> float:
    """Returns the loss, in nats per token, of predicting validation tokens by their frequency in training.

    Frequencies have one added (Laplace), so that a token which training lacks costs much, but not infinitely much.
    """
    probability = (train + 1) / (train.sum() + len(train))
    return float(-(validation * np.log(probability)).sum() / validation.sum())
