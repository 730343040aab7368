"""Tokenization of documents: parallel, in order, and in constant memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from ictx.data.corpus import Document
from ictx.data.tokenizer import added_around

# Characters per piece, which one core encodes at a time.
PIECE = 1 << 14
# Characters that all cores encode at a time: four pieces each. Three batches are in flight, so that reading and writing
# continue meanwhile. The library takes about 200 bytes per token until a batch is done: this dominates memory use.
BATCH = 4 * PIECE * len(os.sched_getaffinity(0))
AHEAD = 3

Tokens = npt.NDArray[Any]


def encoded(
    tokenizer: Tokenizer, documents: Iterable[Document], dtype: np.dtype[Any]
) -> Iterator[tuple[Document, Tokens]]:
    """Yields each document with its tokens, an array of shape (tokens,) that ends with token 0.

    Special tokens in a text are encoded as plain text. Tokens that the tokenizer adds around a text, such as a
    begin-of-text token, are added around the document, as in transformers, not around each piece.
    """
    before, behind = added_around(tokenizer)
    if behind[-1:] == [0]:
        behind = behind[:-1]
    tokenizer.encode_special_tokens = True
    first, last = np.array(before, dtype), np.array([*behind, 0], dtype)
    parts = [first]
    for tokens, document in _tokens(tokenizer, _pieces(documents), dtype):
        parts.append(tokens)
        if document is not None:
            yield document, np.concatenate([*parts, last])
            parts = [first]


def cut(text: str) -> list[str]:
    """Returns the text in pieces of at most `PIECE` characters that have the same tokens as the whole.

    A piece ends before a space that follows a letter, a digit or an ASCII sign, where no merge crosses. A text without
    such a space (base64, Chinese, …) is cut anywhere: its tokens may differ there, but still decode to the same text.
    """
    pieces, start = [], 0
    while len(text) - start > PIECE:
        end = start + PIECE
        place = text.rfind(" ", start + 1, end)
        while place > start and not _ends_a_word(text[place - 1]):
            place = text.rfind(" ", start + 1, place)
        end = place if place > start else end
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _ends_a_word(character: str) -> bool:
    """Returns whether a character is certainly not white space; libraries differ on some of the others."""
    return character.isalnum() or "!" <= character <= "~"


def _pieces(documents: Iterable[Document]) -> Iterator[tuple[str, Document | None]]:
    """Yields pieces; a document's last piece is yielded with the document."""
    for document in documents:
        *first, last = cut(document.text)
        yield from ((piece, None) for piece in first)
        yield last, document


def _batches(pieces: Iterable[tuple[str, Document | None]]) -> Iterator[list[tuple[str, Document | None]]]:
    """Yields lists of pieces with about `BATCH` characters in total."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokens(
    tokenizer: Tokenizer, pieces: Iterable[tuple[str, Document | None]], dtype: np.dtype[Any]
) -> Iterator[tuple[Tokens, Document | None]]:
    """Yields the tokens of each piece, encoded by the library's threads."""

    def encode(texts: list[str]) -> list[Tokens]:
        return [
            np.array(encoding.ids, dtype) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]

    waiting: deque[tuple[list[tuple[str, Document | None]], Future[list[Tokens]]]] = deque()

    def oldest() -> Iterator[tuple[Tokens, Document | None]]:
        batch, future = waiting.popleft()
        for (_, document), tokens in zip(batch, future.result(), strict=True):
            yield tokens, document

    with ThreadPoolExecutor(AHEAD) as pool:
        for batch in _batches(pieces):
            waiting.append((batch, pool.submit(encode, [text for text, _ in batch])))
            if len(waiting) >= AHEAD:
                yield from oldest()
        while waiting:
            yield from oldest()
