"""Variable tracking and word counting (section 3, Multi-hop Tracing and Aggregation)."""

from __future__ import annotations

import string
from itertools import pairwise
from random import Random

from ictx.evaluate.ruler import words
from ictx.evaluate.ruler.needles import NOISE
from ictx.evaluate.ruler.task import Material, Question

HOPS = 4
TRACK = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}\nQuestion: "
    "Find all variables that are assigned the value {value} in the text above."
)
TRACK_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
    "the value {value}, they are: "
)
COMMON, OFTEN, SELDOM = 10, 30, 3
COMMON_PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
    "that appear most often.\n{text}\nQuestion: What are the 10 most common words in the above list?"
)
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
CODED = 6
"""Letters of a coded word."""
ALPHA = 2.0
"""Exponent of the Zeta distribution: word k of the vocabulary has the frequency k^-α / ζ(α); the first is dots."""
CODED_PROMPT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. {text}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What "
    "are the three most frequently appeared words in the above coded text?"
)
CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
ZETA_2 = 1.6449340668482264


def variables(draw: Random, _: Material, size: int) -> Question:
    """Variable tracking: a chain of assignments among `size` sentences, after a short example of one."""
    example, solved = _chain(draw, 5, hops=HOPS, letters=3, value="12345")
    question, names = _chain(draw, size, hops=HOPS, letters=5, value=str(draw.randint(10_000, 99_999)))
    return Question(f"{example.prompt}{example.prefix}{' '.join(solved)}\n\n{question.prompt}", question.prefix, names)


def _chain(draw: Random, size: int, hops: int, letters: int, value: str) -> tuple[Question, list[str]]:
    names = words.distinct(draw, lambda random: words.letters(random, letters, string.ascii_uppercase), hops + 1)
    steps = [f"VAR {names[0]} = {value}"]
    steps += [f"VAR {new} = VAR {old}" for old, new in pairwise(names)]
    sentences = [NOISE] * size
    # Inserts from the end, so that earlier places stay valid; the chain is in the order of the text.
    for place, step in zip(sorted((draw.randint(0, size) for _ in steps), reverse=True), reversed(steps), strict=True):
        sentences.insert(place, step)
    prompt = TRACK.format(text="\n".join(sentences), value=value)
    return Question(prompt, TRACK_PREFIX.format(count=hops + 1, value=value), names), names


def common_words(draw: Random, _: Material, size: int) -> Question:
    """Common words: ten of `size` words are listed 30 times each, the others three times; after an example."""
    example = _list(draw, 40, often=10, seldom=3)
    numbered = " ".join(f"{place}. {word}" for place, word in enumerate(example.answers, 1))
    question = _list(draw, size, OFTEN, SELDOM)
    return Question(
        f"{example.prompt}{example.prefix} {numbered}\n{question.prompt}", question.prefix, question.answers
    )


def _list(draw: Random, size: int, often: int, seldom: int) -> Question:
    chosen = words.distinct(draw, words.pair, size)
    items = chosen[:COMMON] * often + chosen[COMMON:] * seldom
    draw.shuffle(items)
    text = " ".join(f"{place}. {word}" for place, word in enumerate(items, 1))
    return Question(COMMON_PROMPT.format(text=text), COMMON_PREFIX, chosen[:COMMON])


def coded_words(draw: Random, _: Material, size: int) -> Question:
    """Frequent words: the three most frequent of about `size` random strings with a Zipf distribution."""
    vocabulary = words.distinct(draw, lambda random: words.letters(random, CODED), max(size // 20, 40))
    items: list[str] = []
    for rank, word in enumerate(["...", *vocabulary], 1):
        items += [word] * int(size * rank**-ALPHA / ZETA_2)
    draw.shuffle(items)
    return Question(CODED_PROMPT.format(text=" ".join(items)), CODED_PREFIX, vocabulary[:3])
