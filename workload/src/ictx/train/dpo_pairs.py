"""Tokenized pairs of answers: created once per run in its folder, and read in the same order by both engines."""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ictx.data.chat.files import read_meta, read_rows
from ictx.data.chat.forms import Row
from ictx.data.progress import Progress
from ictx.data.shards import SPLITS
from ictx.data.tokenizer import TOKENIZER_FILES
from ictx.errors import UserError
from ictx.folder import replacing
from ictx.manifest import digest, read_json
from ictx.settings import shown
from ictx.train.dpo_loss import PairBatch
from ictx.train.ranks import Ranks

Array = np.ndarray[Any, Any]
ABOUT = "about.json"
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
BLOCK = 256
"""Pairs per written batch."""
MULTIPLE = 64
"""Rows are padded to a multiple of this, because few different lengths avoid fragmentation in the allocator."""


@dataclass(frozen=True)
class Pairs:
    """A run's pairs. `train` and `validation` are `datasets.Dataset`s of `prompt_ids`, `chosen_ids`, `rejected_ids`."""

    train: Any
    validation: Any
    fingerprint: str
    """Fingerprint of the rows, the tokenizer and the length."""
    pad: int
    """Padding token."""
    length: int
    """Maximum tokens of prompt and answer; longer rows are truncated."""

    def batch(self, pairs: Any, reference: Array, parts: int = 1) -> PairBatch:
        """Returns a batch of pairs of a split.

        Args:
            reference: the reference model's log-probabilities of their answers, (pairs, 2).
            parts: rows are padded to a multiple of MULTIPLE · parts.
        """
        rows, firsts = [], []
        for answer in ("chosen_ids", "rejected_ids"):
            for prompt, tokens in zip(pairs["prompt_ids"], pairs[answer], strict=True):
                rows.append((prompt + tokens)[: self.length])
                firsts.append(len(prompt))
        step = MULTIPLE * parts
        ids = torch.full((len(rows), -(-max(map(len, rows)) // step) * step), self.pad)
        labels = torch.full_like(ids, -1)
        for number, (row, first) in enumerate(zip(rows, firsts, strict=True)):
            tokens = torch.tensor(row)
            ids[number, : len(row)] = tokens
            labels[number, first - 1 : len(row) - 1] = tokens[first:]
        lengths = torch.tensor([len(row) - first for row, first in zip(rows, firsts, strict=True)])
        return PairBatch(ids, labels, torch.from_numpy(reference.T.reshape(-1).astype(np.float32)), lengths)


def places(count: int, seed: int, first: int, number: int) -> list[int]:
    """Returns the indices of the next `number` pairs of a run after `first`; each of `count` occurs once per epoch."""
    found: list[int] = []
    while len(found) < number:
        epoch, start = divmod(first + len(found), count)
        found += _order(count, seed, epoch)[start : start + number - len(found)].tolist()
    return found


@functools.lru_cache(2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    # The generator uses only 32 bits of its seed.
    return torch.randperm(count, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch}".encode())))


class PairBatches:
    """A run's infinite sequence of training pairs, like `ictx.data.loader.Batches`."""

    rows = 2
    """Sequences of a window, which is a pair."""

    def __init__(self, pairs: Pairs, reference: Array, batch: int, seed: int, ranks: Ranks) -> None:
        """Args: `reference`: log-probabilities for the training pairs, (pairs, 2); `batch`: pairs per rank."""
        self.pairs, self.reference, self.batch, self.seed, self.ranks = pairs, reference, batch, seed, ranks
        self.windows, self.taken = len(pairs.train), 0

    def next(self) -> PairBatch:
        """Returns this rank's part of the next global batch."""
        found = places(self.windows, self.seed, self.taken + self.ranks.data_rank * self.batch, self.batch)
        self.taken += self.ranks.data_count * self.batch
        place, parts = self.ranks.part
        return self.pairs.batch(self.pairs.train[found], self.reference[found], parts).part(place, parts)

    def state_dict(self) -> dict[str, int]:
        """Returns the position in the order, and the seed."""
        return {"taken": self.taken, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at a position. Raises UserError if the order has another seed."""
        if state["seed"] != self.seed:
            raise UserError(f"train.seed is {self.seed}, but the checkpoint's was {state['seed']}: use that")
        self.taken = state["taken"]


def tokenized(tokenizer: Any, row: Row, length: int) -> dict[str, list[int]] | None:
    """Returns a pair tokenized like in TRL; None if the answers do not differ within `length` tokens.

    The prompt is the common prefix of the rendered prompt and both answered conversations, because a template may
    render the end of a prompt differently when an answer follows.
    """

    def ids(messages: Any, ask: bool = False) -> list[int]:
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=True)["input_ids"])

    prompt, *answered = ids(row["prompt"], True), *(ids(row["prompt"] + row[name]) for name in ("chosen", "rejected"))
    end = min(_alike(prompt, whole) for whole in answered)
    chosen, rejected = (whole[:length] for whole in answered)
    if end >= min(len(chosen), len(rejected)) or chosen == rejected:
        return None
    return {"prompt_ids": prompt[:end], "chosen_ids": answered[0][end:], "rejected_ids": answered[1][end:]}


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def load_tokenizer(directory: Path) -> Any:
    """Returns transformers' tokenizer of a model's folder. Raises UserError for one without a chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} has no tokenizer: {shown(str(error).partition('.')[0])}") from error
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer in {directory} has no chat template: add chat_template to its configuration")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def make(directory: Path, data: Path, vocabulary: Path, length: int) -> None:
    """Tokenizes the pairs of a prepared data folder into `directory`; one process calls it.

    Does nothing if `directory` exists for the same rows, tokenizer and length. Raises UserError if no pair is left.
    """
    about = {"fingerprint": _fingerprint(data, vocabulary, length)}
    if (directory / ABOUT).exists() and read_json(directory / ABOUT) == about:
        return
    tokenizer, meta = load_tokenizer(vocabulary), read_meta(data, "dpo")
    with replacing(directory) as draft:
        for split in SPLITS:
            count, size = (meta["splits"][split][name] for name in ("rows", "bytes"))
            with Progress(f"tokenizing {split} pairs", size) as progress:
                made = _write(draft / f"{split}.arrow", _tokenized(tokenizer, read_rows(data, split), length, progress))
            if not made:
                raise UserError(
                    f"{data} has no {split} pair whose answers differ in its first {length} tokens: raise "
                    "train.sequence_length"
                )
            if made < count:
                print(f"skipped {count - made:,} of {count:,} {split} pairs: their answers do not differ in the "
                      f"first {length:,} tokens (train.sequence_length)", flush=True)  # fmt: skip
        (draft / ABOUT).write_text(json.dumps(about) + "\n")


def _tokenized(tokenizer: Any, rows: Iterable[Row], length: int, progress: Progress) -> Iterator[dict[str, list[int]]]:
    for row in rows:
        progress.add(len(json.dumps(row, ensure_ascii=False).encode()))
        if found := tokenized(tokenizer, row, length):
            yield found


def _write(path: Path, pairs: Iterator[dict[str, list[int]]]) -> int:
    """Streams pairs to a file in the format of `datasets`; returns their number."""
    schema, count = pa.schema({name: pa.list_(pa.int32()) for name in COLUMNS}), 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        while block := list(islice(pairs, BLOCK)):
            stream.write_batch(pa.RecordBatch.from_pylist(block, schema))
            count += len(block)
    return count


def _fingerprint(data: Path, vocabulary: Path, length: int) -> str:
    files = [digest(vocabulary / name).sha256 for name in TOKENIZER_FILES if (vocabulary / name).exists()]
    content = json.dumps([read_meta(data, "dpo")["fingerprint"], files, length])
    return hashlib.sha256(content.encode()).hexdigest()


def opened(directory: Path, vocabulary: Path, length: int) -> Pairs:
    """Returns the pairs that `make` wrote; every rank may call it after `make`."""
    from datasets import Dataset

    train, validation = (Dataset.from_file(str(directory / f"{split}.arrow")) for split in SPLITS)
    pad = load_tokenizer(vocabulary).pad_token_id
    return Pairs(train, validation, read_json(directory / ABOUT)["fingerprint"], pad, length)
