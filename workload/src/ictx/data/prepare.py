"""Trains the tokenizer on a corpus and writes the corpus as token arrays."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ictx import __version__
from ictx.data.corpus import Corpus
from ictx.errors import UserError

END_OF_TEXT = "<|endoftext|>"
META_FILE, TOKENIZER_FILE = "meta.json", "tokenizer.json"
# Documents that are encoded at once: bounds memory, keeps every core busy.
CHUNK = 64
# Folders that nothing was added to for so long are not being written any more.
STALE_SECONDS = 24 * 3600


@dataclass(frozen=True)
class DataConfig:
    """How a corpus becomes tokens."""

    vocab_size: int = 4096
    """Entries of the tokenizer's vocabulary."""
    min_bytes: int = 20_000_000
    """A smaller corpus is refused."""
    validation_share: float = 0.02
    """Share of the documents that are kept for validation."""
    seed: int = 0
    """Chooses the documents for validation."""
    dir: Path | None = None
    """Prepared data (training only)."""

    def __post_init__(self) -> None:
        if not 257 <= self.vocab_size <= 1 << 31:
            raise ValueError(f"vocab_size is {self.vocab_size}: expected at least 257 (all bytes and {END_OF_TEXT})")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}: expected more than 0 and less than 1")


def prepare(corpus_paths: Sequence[Path], out: Path, config: DataConfig) -> Path:
    """Returns the folder below `out` that holds the corpus prepared as `config` says; makes it unless it is there.

    The folder's name follows the text and the settings, so the same corpus is prepared once. It appears complete or
    not at all. Raises UserError naming a path, or the folder when its disk is full.
    """
    start = time.monotonic()
    print(f"reading {', '.join(map(str, corpus_paths))}", flush=True)
    corpus = Corpus.scan(corpus_paths, config.min_bytes)
    settings = {**asdict(config), "dir": None, "format": 1}
    identity = hashlib.sha256(json.dumps([corpus.fingerprint, settings], sort_keys=True).encode()).hexdigest()
    directory = out / identity[:16]
    print(f"corpus: {len(corpus.files):,} distinct files, {corpus.bytes / 1e6:.1f} MB of text", flush=True)
    for left in out.glob(".*.part"):
        # A killed run cannot tidy up, and a run takes minutes.
        if time.time() - left.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    if (directory / META_FILE).exists():
        print(f"{directory} holds this corpus already: nothing to do", flush=True)
        return directory
    # No process number: in containers of every node and of every job it is the same.
    draft = out / f".{directory.name}.{uuid.uuid4().hex[:12]}.part"
    try:
        draft.mkdir(parents=True)
        tokenizer = train_tokenizer(corpus, config.vocab_size)
        (draft / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True))
        print(f"tokenizer: {tokenizer.get_vocab_size()} entries, {time.monotonic() - start:.0f} s", flush=True)
        meta = write_tokens(corpus, tokenizer, draft, config)
        (draft / META_FILE).write_text(json.dumps({"ictx": __version__, "fingerprint": identity, **meta}, indent=1))
        try:
            draft.replace(directory)
        except OSError:
            # Another job was quicker with the same text.
            if not (directory / META_FILE).exists():
                raise
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


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE tokenizer whose token 0 ends a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.documents(), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise UserError(
            f"vocab_size is {vocab_size}, but the corpus yields only {tokenizer.get_vocab_size()} entries: "
            "lower it or add text"
        )
    return tokenizer


def write_tokens(corpus: Corpus, tokenizer: Tokenizer, directory: Path, config: DataConfig) -> dict[str, Any]:
    """Writes train.bin and validation.bin (little-endian tokens, documents end with token 0); returns what to know."""
    dtype = np.dtype("<u2" if config.vocab_size <= 1 << 16 else "<u4")
    counts = {split: np.zeros(config.vocab_size, np.int64) for split in ("train", "validation")}
    files = {split: (directory / f"{split}.bin").open("wb") for split in counts}
    hashes = {split: hashlib.sha256() for split in counts}
    documents, done, told = corpus.documents(), 0, time.monotonic()
    while chunk := list(islice(documents, CHUNK)):
        for text, encoding in zip(chunk, tokenizer.encode_batch_fast(chunk), strict=True):
            split = "validation" if _share(text, config.seed) < config.validation_share else "train"
            tokens = np.array([*encoding.ids, 0], dtype)
            counts[split] += np.bincount(tokens, minlength=config.vocab_size)
            hashes[split].update(tokens.tobytes())
            files[split].write(tokens.tobytes())
            done += len(text)
        if time.monotonic() - told > 5:
            told = time.monotonic()
            print(f"tokenised {min(done / corpus.bytes, 1):.0%}", flush=True)
    for file in files.values():
        file.flush()
        os.fsync(file.fileno())
        file.close()
    if not all(count.sum() for count in counts.values()):
        raise UserError("the corpus has too few documents for a validation share: add text or raise validation_share")
    return {
        "vocab_size": config.vocab_size,
        "dtype": dtype.str,
        "end_of_text": [0, END_OF_TEXT],
        "corpus_bytes": corpus.bytes,
        **{f"{split}_tokens": int(count.sum()) for split, count in counts.items()},
        **{f"{split}_sha256": digest.hexdigest() for split, digest in hashes.items()},
        "unigram_entropy": unigram_entropy(counts["train"], counts["validation"]),
    }


def unigram_entropy(train: npt.NDArray[np.int64], validation: npt.NDArray[np.int64]) -> float:
    """Returns the loss, in nats per token, of predicting validation tokens by their frequency in training.

    Frequencies have one added (Laplace), so that a token which training lacks costs much, but not infinitely much.
    """
    probability = (train + 1) / (train.sum() + len(train))
    return float(-(validation * np.log(probability)).sum() / validation.sum())


def _share(text: str, seed: int) -> float:
    """Returns a number in [0, 1) that depends on the document and the seed alone."""
    digest = hashlib.sha256(f"{seed}:".encode() + text.encode()).digest()
    return int.from_bytes(digest[:8], "big") / math.pow(2, 64)
