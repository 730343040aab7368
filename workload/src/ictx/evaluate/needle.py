"""Needle in a haystack: whether a model retrieves a sentence from some depth of a long text.

After github.com/gkamradt/LLMTest_NeedleInAHaystack. The prompt ends with a sentence that the number completes, so that
base models and instruction models are measured alike. A needle is found if greedy decoding yields all tokens of the
number; their −ln p shows how close a model is that does not find it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ictx.errors import UserError
from ictx.evaluate.intervals import bootstrap
from ictx.evaluate.samples import Planned, require_samples
from ictx.folder import read_text
from ictx.infer.likelihood import Prefill, continuation
from ictx.infer.vocabulary import Vocabulary
from ictx.model import Transformer

CITIES = ("Lisbon", "Nairobi", "Osaka", "Quito", "Riga", "Sydney", "Tunis", "Warsaw")
NEEDLE = " The magic number of {city} is {number}."
QUESTION = "\n\nThe text above names a magic number. The magic number of {city} is"


@dataclass(frozen=True)
class Needle:
    """A sample: tokens of the whole text, depth of the needle (0 to 1), and number of the sample at this place."""

    length: int
    depth: float
    number: int


@dataclass(frozen=True)
class Haystack:
    """Text without a needle, repeated to the required length."""

    tokens: list[int]
    ends: frozenset[int]
    """Token ids that end a sentence: a needle is inserted after one."""

    @classmethod
    def of(cls, text: str, vocabulary: Vocabulary) -> Haystack:
        """Returns a text's tokens. Raises UserError if there are none."""
        tokens = vocabulary.tokenizer.encode(text.strip() + "\n", add_special_tokens=False).ids
        if not tokens:
            raise UserError("the haystack is empty: expected text")
        decode = vocabulary.tokenizer.decode
        ends = {token for token in set(tokens) if decode([token]).rstrip(" ").endswith((".", "\n"))}
        return cls(tokens, frozenset(ends))

    def part(self, first: int, count: int) -> list[int]:
        """Returns `count` tokens from position `first`, continued from the beginning after the last."""
        size = len(self.tokens)
        repeats = (first % size + count) // size + 1
        return (self.tokens * repeats)[first % size : first % size + count]


def haystack_text(file: Path | None) -> str:
    """Returns a file's text; default: the help topics of Python, which depend only on its version."""
    if file:
        return read_text(file)
    from pydoc_data import topics

    return "\n".join(topics.topics.values())


def fingerprint(text: str) -> str:
    """Returns 16 hexadecimal digits of a text's SHA-256; results with equal fingerprints are comparable."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def plan(lengths: Sequence[int], depths: Sequence[float], samples: int) -> list[Planned[Needle]]:
    """Returns the grid's samples, shortest first. Raises UserError for an invalid depth or number of samples."""
    require_samples(samples)
    for depth in depths:
        if not 0 <= depth <= 1:
            raise UserError(f"depth is {depth}: expected 0 (the beginning) to 1 (the end)")
    return [
        Planned(f"{length} {depth:g} {number}", length, Needle(length, depth, number))
        for length in sorted(set(lengths))
        for depth in sorted(set(depths))
        for number in range(samples)
    ]


def build(needle: Needle, haystack: Haystack, vocabulary: Vocabulary, seed: int) -> tuple[list[int], list[int]]:
    """Returns the tokens of prompt and answer, `length` in total. Raises UserError if `length` is too small."""
    draw = random.Random(f"{seed} {needle.length} {needle.depth:g} {needle.number}")
    city, number = draw.choice(CITIES), str(draw.randrange(1_000_000, 10_000_000))

    def encode(text: str) -> list[int]:
        return list(vocabulary.tokenizer.encode(text, add_special_tokens=False).ids)

    begin = vocabulary.encode("", chat=False)
    sentence, question = encode(NEEDLE.format(city=city, number=number)), encode(QUESTION.format(city=city))
    answer = encode(f" {number}")
    room = needle.length - sum(map(len, (begin, sentence, question, answer)))
    if room < 1:
        raise UserError(f"length is {needle.length}: the needle and its question take {needle.length - room} tokens")
    text = haystack.part(draw.randrange(len(haystack.tokens)), room)
    place = round(needle.depth * room)
    # Move back to the end of a sentence, if one is near.
    before = next((place - back for back in range(place) if text[place - back - 1] in haystack.ends), None)
    place = place if before is None or place - before > room // 10 else before
    return begin + text[:place] + sentence + text[place:] + question, answer


def measure(
    model: Transformer, vocabulary: Vocabulary, haystack: Haystack, needle: Needle, prefill: Prefill, seed: int = 0
) -> dict[str, Any]:
    """Returns a record: whether the needle is found, and the mean loss of the answer's tokens in nats."""
    prompt, answer = build(needle, haystack, vocabulary, seed)
    losses, found = continuation(model, prompt, answer, prefill)
    return {
        "length": needle.length,
        "depth": needle.depth,
        "found": found,
        "nats_per_token": float(losses.mean()),
        "tokens": len(prompt) + len(answer),
    }


def sum_up(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the share of needles found: overall with its interval, by length, and by length and depth."""
    lengths = sorted({record["length"] for record in records})
    depths = sorted({record["depth"] for record in records})

    def of(length: int, depth: float | None = None) -> dict[str, float]:
        chosen = [r for r in records if r["length"] == length and depth in (None, r["depth"])]
        return {
            "found": sum(r["found"] for r in chosen) / len(chosen),
            "nats_per_token": sum(r["nats_per_token"] for r in chosen) / len(chosen),
        }

    share = bootstrap([float(record["found"]) for record in records])
    return {
        "needle": share.mean,
        "needle_low": share.low,
        "needle_high": share.high,
        "needle_nats": sum(record["nats_per_token"] for record in records) / len(records),
        "lengths": [{"length": length, **of(length)} for length in lengths],
        "grid": [{"length": n, "depth": depth, **of(n, depth)} for n in lengths for depth in depths],
    }
