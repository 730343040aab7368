"""Conversations as tokens, with a mark on the tokens of answers, which the loss covers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from ictx.data.chat.forms import Row
from ictx.data.chat.template import Span, Template
from ictx.errors import UserError

Tokens = npt.NDArray[np.int32]
"""A conversation, shape (tokens,): an answer's token as its id, any other token `t` as `-1 - t`."""
BATCH = 512
"""Conversations that the library encodes at a time, on all cores."""
TYPE = np.dtype("<i4")


def numbers(tokens: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Returns the token ids, int64, without the mark of answers."""
    wide = tokens.astype(np.int64)
    return np.where(wide < 0, -1 - wide, wide)


def encoded(rows: Iterable[Row], tokenizer: Tokenizer, template: Template) -> Iterator[Tokens]:
    """Yields each conversation's tokens, equal to those of transformers' `apply_chat_template` with its answer mask.

    Raises UserError if the template fails or does not mark the answers.
    """
    rest = iter(rows)
    while batch := list(islice(rest, BATCH)):
        rendered = [template.render(row["messages"]) for row in batch]
        encodings = tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        for (_, spans), encoding in zip(rendered, encodings, strict=True):
            if not spans:
                raise UserError(
                    "the chat template does not mark the answers: put {% generation %} and {% endgeneration %} around "
                    "what the model writes, and set the file as chat_template"
                )
            yield _tokens(encoding, spans)


def _tokens(encoding: Encoding, spans: list[Span]) -> Tokens:
    ids, offsets = np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)
    answers = np.zeros(len(ids), bool)
    for start, end in spans:
        answers |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return np.where(answers, ids, -1 - ids)


class Conversations:
    """Encoded conversations in a file, memory-mapped."""

    def __init__(self, tokens: npt.NDArray[Any], ends: npt.NDArray[np.int64]) -> None:
        """Args: `tokens`: those of all conversations, concatenated; `ends`: end position of each conversation."""
        self.tokens, self.ends = tokens, ends
        self.sizes = np.diff(ends, prepend=0)

    @classmethod
    def open(cls, file: Path) -> Conversations:
        """Maps a file of `write`."""
        return cls(np.memmap(file, TYPE, "r"), np.load(file.with_suffix(".ends.npy")))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> npt.NDArray[Any]:
        end = int(self.ends[number])
        return self.tokens[end - int(self.sizes[number]) : end]


def write(file: Path, conversations: Iterable[Tokens], longest: int) -> tuple[int, int, int]:
    """Writes the conversations of at most `longest` tokens; returns the counts of written and dropped ones, and the
    tokens of the longest one."""
    ends, total, dropped, most = [], 0, 0, 0
    with file.open("wb") as out:
        for tokens in conversations:
            most = max(most, len(tokens))
            if len(tokens) > longest:
                dropped += 1
                continue
            total += len(tokens)
            ends.append(total)
            out.write(tokens.astype(TYPE).tobytes())
    np.save(file.with_suffix(".ends.npy"), np.array(ends, np.int64))
    return len(ends), dropped, most
