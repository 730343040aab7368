"""Perplexity and bits per byte of a text, overall and by position."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from ictx.data.config import DataConfig
from ictx.data.shards import SplitName, TokenArray
from ictx.data.skipped import Skipped
from ictx.data.sources import source
from ictx.data.tokenizer import read_tokenizer
from ictx.errors import UserError
from ictx.evaluate.intervals import bootstrap
from ictx.evaluate.samples import Planned, require_samples
from ictx.infer.likelihood import Prefill, token_losses
from ictx.infer.vocabulary import Vocabulary
from ictx.model import Transformer

FIRST_BUCKET = 256
"""End of the first bucket of positions; each later one ends at twice the position."""
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Text:
    """Windows of text, each one token longer than the model's input."""

    windows: Sequence[Tokens]
    origin: Mapping[str, Any]
    """Identity of the text and its windows: equal if two measurements are comparable."""

    def plan(self) -> list[Planned[Tokens]]:
        """Returns the windows as samples."""
        return [Planned(str(number), len(window) - 1, window) for number, window in enumerate(self.windows)]


def prepared(
    directory: Path, vocabulary: Vocabulary, length: int, count: int, split: SplitName, whole_documents: bool
) -> Text:
    """Returns windows of `length` inputs, spread evenly over prepared data.

    Args:
        whole_documents: whether each window is the beginning of a document that is long enough; otherwise, a window may
            span several documents.

    Raises UserError if the data was prepared with another tokenizer or is too short.
    """
    require_samples(count)
    data = TokenArray.open(directory, split)
    if read_tokenizer(directory).get_vocab() != vocabulary.tokenizer.get_vocab():
        raise UserError(f"{directory} was prepared with another tokenizer than the model's: give its text with --files")
    if whole_documents:
        found = [
            shard.tokens[end - size : end - size + length + 1].astype(np.int64)
            for shard in data.shards
            for end, size in zip(shard.ends, np.diff(shard.ends, prepend=0), strict=True)
            if size > length
        ]
        windows = [found[number] for number in _spread(len(found), count)]
    else:
        windows = [data.window(number, length)[0] for number in _spread(data.windows(length), count)]
    if not windows:
        what = "no document" if whole_documents else "no window"
        raise UserError(f"{directory} has {what} of {length:,} tokens in its {split} split: lower --length")
    for window in windows:
        data.require_known(window)
    origin = {"data": data.meta["fingerprint"], "split": split, "whole_documents": whole_documents}
    return Text(windows, origin | _measured(vocabulary, length, count))


def _measured(vocabulary: Vocabulary, length: int, count: int) -> dict[str, Any]:
    """Returns the settings that perplexity depends on besides text and model; it is per token of this tokenizer."""
    tokenizer = hashlib.sha256(json.dumps(vocabulary.tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()[:16]
    return {"tokenizer": tokenizer, "length": length, "samples": count}


def files(names: Sequence[str], vocabulary: Vocabulary, length: int, count: int, field: str = "text") -> Text:
    """Returns windows of the concatenated documents in files or folders; see `prepared`. Raises UserError."""
    require_samples(count)
    end = sorted(vocabulary.stop)[:1]
    tokens: list[int] = []
    sha256 = hashlib.sha256()
    config, skipped = DataConfig(text_field=field), Skipped()
    for name in names:
        for text in source(name).texts(config, skipped):
            sha256.update(hashlib.sha256(text.encode(errors="replace")).digest())
            tokens += vocabulary.tokenizer.encode(text, add_special_tokens=False).ids + end
    for line in skipped.lines():
        print(line)
    # A text shorter than a window is one window.
    length = min(length, len(tokens) - 1)
    if length < 1:
        raise UserError(f"{', '.join(names)}: no text to read")
    everything = np.array(tokens, dtype=np.int64)
    places = _spread((len(tokens) - 1) // length, count)
    windows = [everything[place * length : place * length + length + 1] for place in places]
    return Text(windows, {"data": sha256.hexdigest(), **_measured(vocabulary, length, count)})


def _spread(available: int, count: int) -> list[int]:
    """Returns up to `count` evenly spaced numbers below `available`."""
    count = min(count, available)
    return [number * available // count for number in range(count)]


def bytes_of_tokens(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Returns the bytes of text of each token, int64 (vocabulary,); 0 for special tokens."""
    vocabulary = tokenizer.get_vocab()
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    # Byte-level vocabularies (GPT-2) have one letter per byte, those of SentencePiece have ▁ instead of a space.
    by_letter = "ByteLevel" in json.dumps(json.loads(tokenizer.to_str())["decoder"])
    sizes = np.zeros(max(vocabulary.values(), default=-1) + 1, dtype=np.int64)
    for text, number in vocabulary.items():
        if number in special:
            continue
        if by_letter:
            sizes[number] = len(text)
        else:
            one = len(text) == 6 and text.startswith("<0x")
            sizes[number] = 1 if one else len(text.replace("▁", " ").encode(errors="replace"))
    return sizes


def edges(length: int) -> list[int]:
    """Returns the beginnings of the buckets of positions, and the end of the last one."""
    found = [0]
    step = FIRST_BUCKET
    while step < length:
        found.append(step)
        step *= 2
    return [*found, length]


def measure(
    model: Transformer, windows: Sequence[Tokens], sizes: npt.NDArray[np.int64], prefill: Prefill
) -> Iterator[dict[str, Any]]:
    """Yields for each window the total loss in nats, the tokens and the bytes of text per bucket of positions."""
    tokens_bs = torch.from_numpy(np.stack(windows))
    losses_bs = token_losses(model, tokens_bs, prefill).double().numpy()
    for window, losses in zip(windows, losses_bs, strict=True):
        parts = list(pairwise(edges(len(window) - 1)))
        # A tokenizer may have fewer entries than the model: the others have no text.
        texts = np.append(sizes, 0)[np.minimum(window[1:], len(sizes))]
        yield {
            "nats": [float(losses[first:last].sum()) for first, last in parts],
            "tokens": [last - first for first, last in parts],
            "bytes": [int(texts[first:last].sum()) for first, last in parts],
        }


def sum_up(records: Sequence[Mapping[str, Any]], length: int) -> dict[str, Any]:
    """Returns perplexity e^(nats / token) and bits per byte, overall and by bucket, from the records of `measure`."""
    totals = {
        name: np.array([record[name] for record in records], dtype=np.float64) for name in ("nats", "tokens", "bytes")
    }
    nats_w, tokens_w = totals["nats"].sum(1), totals["tokens"].sum(1)
    interval = bootstrap(nats_w / tokens_w, tokens_w)
    whole = _rates(*(float(totals[name].sum()) for name in ("nats", "tokens", "bytes")))
    buckets = [
        {"first": first, "last": last - 1}
        | _rates(*(float(totals[name][:, number].sum()) for name in ("nats", "tokens", "bytes")))
        for number, (first, last) in enumerate(pairwise(edges(length)))
    ]
    if not math.isfinite(whole["nats_per_token"]):
        raise UserError("the model's losses are not finite: its weights are damaged, or too large for their dtype")
    return {
        **whole,
        "perplexity_low": _exp(interval.low),
        "perplexity_high": _exp(interval.high),
        "buckets": buckets,
    }


def _rates(nats: float, tokens: float, size: float) -> dict[str, float]:
    """Returns the loss per token in nats, the perplexity, and the bits per byte of text (nan without text)."""
    bits = nats / math.log(2) / size if size else math.nan
    return {"nats_per_token": nats / tokens, "perplexity": _exp(nats / tokens), "bits_per_byte": bits, "tokens": tokens}


def _exp(nats: float) -> float:
    """Returns e^nats; infinity on overflow."""
    return math.exp(nats) if nats < 709 else math.inf
