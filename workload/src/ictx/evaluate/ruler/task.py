"""What a task of RULER is, and how large its text must be for a length in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol

from ictx.errors import UserError
from ictx.settings import shown


class Question(NamedTuple):
    """A prompt, with which words the answer to it begins, and what it must contain."""

    prompt: str
    prefix: str
    answers: list[str]


class Material(Protocol):
    """Text that tasks are made of."""

    @property
    def sentences(self) -> Sequence[str]:
        """Of an essay, in order."""


Build = Callable[[Random, Material, int], Question]
"""Makes a question around `size` pieces of text; the same draws and size make the same."""


@dataclass(frozen=True)
class Task:
    """A task."""

    build: Build
    new_tokens: int
    """That the model writes."""
    smallest: int
    """Pieces of text that the question needs."""
    any_answer: bool = False
    """Whether one of the answers is enough (questions); else each that is found counts."""

    def score(self, text: str, answers: Sequence[str]) -> float:
        """Returns the share of answers in a text, or whether there is any: `string_match_all` and `_part` of RULER."""
        found = [answer.lower() in text.lower() for answer in answers]
        return float(any(found)) if self.any_answer else sum(found) / len(found)


def largest(count_tokens: Callable[[int], int], room: int, smallest: int, name: str) -> int:
    """Returns how many pieces of text fill `room` tokens: to 98 %, or as many as fit.

    Args:
        count_tokens: of the whole prompt with so many pieces; grows with them.

    Raises UserError where not even the smallest number fits.
    """
    low, tokens = smallest, count_tokens(smallest)
    if tokens > room:
        raise UserError(f"{name} takes {tokens:,} tokens and its answer: lengthen it")
    high, slope = 0, max(tokens / smallest, 1e-3)
    while tokens < 0.98 * room and (not high or high - low > 1):
        # Tokens grow nearly in proportion: where the last step leads, but not too far.
        guess = low + min(max(int((room - tokens) / slope), 1), 4 * low)
        if high and guess >= high:
            guess = (low + high) // 2
        made = count_tokens(guess)
        slope = max((made - tokens) / (guess - low), 1e-3)
        if made <= room:
            low, tokens = guess, made
        else:
            high = guess
    return low


def pick(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Returns the tasks of these names, in RULER's order; `all` means all. Raises UserError."""
    for name in names:
        if name not in (*known, "all"):
            raise UserError(f"task {shown(name)} is none of RULER's: expected all, or of {', '.join(known)}")
    return [name for name in known if "all" in names or name in names]
