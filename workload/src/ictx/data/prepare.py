"""Preparation of a corpus: a folder with a tokenizer, and shards of tokens for training and validation."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
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
from ictx.data.publish import draft_in, held, publish
from ictx.data.shards import FORMAT, META_FILE, SPLITS, SplitWriter
from ictx.data.tokenizer import (
    END_OF_TEXT,
    SPECIAL_TOKENS,
    TOKENIZER_FILES,
    added_around,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from ictx.errors import UserError, printable
from ictx.manifest import digest


def prepare(sources: Sequence[str | Path], out: Path, config: DataConfig) -> Path:
    """Returns the folder below `out` with the corpus prepared by `config`; creates it if it is missing.

    Args:
        sources: files, folders and data sets, as `ictx.data.sources.source` reads them.

    The folder's name is a hash of text and settings, so that the same corpus is prepared only once. The folder is
    created atomically. Raises UserError naming a path, or the folder if its disk is full.
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
        f"({found.repeated:,} duplicates)",
        flush=True,
    )
    for line in found.skipped:
        print(line, flush=True)
    if found_before := held(out, name, fingerprint, config):
        return found_before
    with draft_in(out) as draft:
        tokenizer = given or _trained(corpus, found, config)
        save_tokenizer(tokenizer, draft)
        print(f"tokenizer: {tokenizer.get_vocab_size():,} entries, {time.monotonic() - start:.0f} s", flush=True)
        meta = write_tokens(corpus, found, tokenizer, draft, config)
        sums = {name: digest(draft / name).sha256 for name in TOKENIZER_FILES}
        about = {"ictx": __version__, "format": FORMAT, "fingerprint": fingerprint, "sha256": sums}
        (draft / META_FILE).write_text(json.dumps({**about, **meta}, indent=1) + "\n")
        directory = publish(draft, name, fingerprint, config)
    print(
        f"{directory}: {meta['train_tokens']:,} training and {meta['validation_tokens']:,} validation tokens, "
        f"unigram entropy {meta['unigram_entropy']:.3f} nats, {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return directory


def described(tokenizer: Tokenizer) -> str:
    """Returns the identity of a tokenizer; earlier versions added its surrounding tokens to pieces of texts."""
    around = added_around(tokenizer)
    return str(tokenizer.to_str()) + (repr(around) if any(around) else "")


def _trained(corpus: Corpus, found: Summary, config: DataConfig) -> Tokenizer:
    """Trains a tokenizer on the corpus, or on a sample of `tokenizer_bytes` of it."""
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
    """Writes the shards of both splits; returns their metadata. Raises UserError."""
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
    """Returns the unigram entropy: the loss, in nats per token, of predicting tokens by their training frequency.

    Counts are smoothed by adding one (Laplace), so that tokens missing in training have a finite loss.
    """
    probability = (train + 1) / (train.sum() + len(train))
    return float(-(validation * np.log(probability)).sum() / validation.sum())
