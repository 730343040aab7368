"""The eight tasks that hide sentences in a text (section 3, Retrieval)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import Literal

from ictx.evaluate.ruler import words
from ictx.evaluate.ruler.task import Material, Question

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SENTENCE = "One of the special magic {kind} for {key} is: {value}."
PROMPT = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will quiz "
    "you about the {kind} afterwards.\n{text}\nWhat {are_all} the special magic {kind} for {query} mentioned in "
    "the provided text?"
)
PREFIX = " The special magic {kind} for {query} mentioned in the provided text {are}"
MAKE = {"words": words.pair, "numbers": words.number, "uuids": words.identifier}
Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class Needles:
    """A variant of the task."""

    haystack: Literal["noise", "essay", "needle"]
    """Text around the needles: one repeated sentence, any text, or similar sentences."""
    keys: int = 1
    values: int = 1
    """Values per key."""
    queries: int = 1
    """Number of queried keys."""
    key: Kind = "words"
    value: Kind = "numbers"

    def __call__(self, draw: Random, material: Material, size: int) -> Question:
        """Returns the question with `size` sentences around the needles."""
        count = max(self.keys, self.queries)
        surround = size if self.haystack == "needle" else 0
        keys = words.distinct(draw, MAKE[self.key], count + surround)
        values = words.distinct(draw, MAKE[self.value], count * self.values + surround)
        wanted, kind = keys[:count], self.value
        answers = {key: values[place * self.values : (place + 1) * self.values] for place, key in enumerate(wanted)}
        needles = [SENTENCE.format(kind=kind, key=key, value=value) for key in wanted for value in answers[key]]
        draw.shuffle(needles)
        if self.haystack == "essay":
            sentences = list(islice(cycle(material.sentences), size))
        elif self.haystack == "noise":
            sentences = [NOISE] * size
        else:
            others = zip(keys[count:], values[count * self.values :], strict=True)
            sentences = [SENTENCE.format(kind=kind, key=key, value=value) for key, value in others]
        places = sorted((draw.randint(0, size) for _ in needles), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            sentences.insert(place, needle)
        asked = draw.sample(wanted, self.queries)
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        single = self.queries * self.values == 1
        forms = {
            "kind": kind[:-1] if single else kind,
            "query": query,
            "some": "A" if single else "Some",
            "are": "is" if single else "are",
            "are_all": "is" if single else "are all",
        }
        text = (" " if self.haystack == "essay" else "\n").join(sentences)
        expected = [value for key in asked for value in answers[key]]
        return Question(PROMPT.format(text=text, **forms), PREFIX.format(**forms), expected)
