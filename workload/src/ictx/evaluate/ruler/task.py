"""Interface of RULER's tasks, and the size of their text for a length in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol

from ictx.errors import UserError
from ictx.settings import shown


class Question(NamedTuple):
    """A prompt, the beginning of the answer, and the strings that the answer must contain."""

    prompt: str
    prefix: str
    answers: list[str]


class Material(Protocol):
    """Text from which tasks are built."""

    @property
    def sentences(self) -> Sequence[str]:
        """Sentences of an essay, in order."""


Build = Callable[[Random, Material, int], Question]
"""Builds a question with `size` pieces of text; deterministic for equal draws and size."""


@dataclass(frozen=True)
class Task:
    """A task of RULER."""

    build: Build
    new_tokens: int
    """Maximum tokens of the answer."""
    smallest: int
    """Minimum pieces of text."""
    any_answer: bool = False
    """Whether one of the answers is enough (questions); otherwise, the score is the share of answers found."""

    def score(self, text: str, answers: Sequence[str]) -> float:
        """Returns the share of answers in a text, or 1 if it has any: RULER's `string_match_all` and `_part`."""
        found = [answer.lower() in text.lower() for answer in answers]
        return float(any(found)) if self.any_answer else sum(found) / len(found)


def largest(count_tokens: Callable[[int], int], room: int, smallest: int, name: str) -> int:
    """Returns the number of pieces of text that fill at least 98 % of `room` tokens, or the largest that fits.

    Args:
        count_tokens: returns the tokens of the whole prompt for a number of pieces; must be increasing.

    Raises UserError if the smallest number does not fit.
    """
    low, tokens = smallest, count_tokens(smallest)
    if tokens > room:
        raise UserError(f"{name} takes {tokens:,} tokens without its answer: increase the length")
    high, slope = 0, max(tokens / smallest, 1e-3)
    while tokens < 0.98 * room and (not high or high - low > 1):
        # Tokens grow almost linearly: extrapolate the last step, but not too far.
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
    """Returns the names of the selected tasks, in RULER's order; `all` selects all. Raises UserError."""
    for name in names:
        if name not in (*known, "all"):
            raise UserError(f"task {shown(name)} is not one of RULER's: expected all, or some of {', '.join(known)}")
    return [name for name in known if "all" in names or name in names]
