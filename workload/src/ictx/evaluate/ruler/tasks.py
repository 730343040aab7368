"""The thirteen tasks, with the sizes in RULER's scripts/synthetic.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from random import Random

from ictx.evaluate.ruler.counting import COMMON, coded_words, common_words, variables
from ictx.evaluate.ruler.needles import Needles
from ictx.evaluate.ruler.questions import Documents
from ictx.evaluate.ruler.task import Question, Task, largest
from ictx.infer.vocabulary import Vocabulary

NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", queries=4),
}
NAMES = (*NEEDLES, "vt", "cwe", "fwe", "qa_1", "qa_2")


@dataclass(frozen=True)
class Essay:
    """A text for haystacks."""

    text: str

    @cached_property
    def sentences(self) -> list[str]:
        """Its sentences, with white space collapsed."""
        return re.split(r"(?<=[.!?]) ", " ".join(self.text.split()))


def tasks(one: Documents, two: Documents) -> dict[str, Task]:
    """Returns the tasks by name.

    Args:
        one: questions whose answer is in one document.
        two: questions whose answer requires two documents.
    """
    found = {name: Task(needles, 128, 1) for name, needles in NEEDLES.items()}
    found["vt"] = Task(variables, 30, 1)
    found["cwe"] = Task(common_words, 120, COMMON + 1)
    # With fewer, words of neighbouring ranks have equal frequencies.
    found["fwe"] = Task(coded_words, 50, 100)
    found["qa_1"] = Task(one, 32, 2, any_answer=True)
    found["qa_2"] = Task(two, 32, 3, any_answer=True)
    return found


@dataclass(frozen=True)
class Prompts:
    """Builds prompts of a given length in tokens."""

    tasks: Mapping[str, Task]
    essay: Essay
    vocabulary: Vocabulary
    chat: bool
    """Whether the question is a user message, and its prefix begins the model's answer."""
    seed: int

    def size(self, name: str, length: int) -> int:
        """Returns the pieces of text that fill the length. Raises UserError if the task does not fit."""
        task = self.tasks[name]

        def count(size: int) -> int:
            return len(self.tokens(self.question(name, length, 0, size)))

        return largest(count, length - task.new_tokens, task.smallest, f"{name} at length {length:,}")

    def question(self, name: str, length: int, number: int, size: int) -> Question:
        """Returns question `number` of a task with `size` pieces of text."""
        return self.tasks[name].build(Random(f"{self.seed} {name} {length} {number}"), self.essay, size)

    def tokens(self, question: Question) -> list[int]:
        """Returns a prompt's tokens, including the beginning of the answer."""
        if not self.chat:
            return self.vocabulary.encode(question.prompt + question.prefix, chat=False)
        prefix = self.vocabulary.tokenizer.encode(question.prefix.lstrip(), add_special_tokens=False).ids
        return self.vocabulary.encode(question.prompt, chat=True) + list(prefix)

    def fitting(self, name: str, length: int, number: int, size: int) -> tuple[list[int], Question]:
        """Returns a prompt that fits, and its question; with less text if this draw is longer than the measured one."""
        task = self.tasks[name]
        while True:
            question = self.question(name, length, number, size)
            tokens = self.tokens(question)
            if len(tokens) <= length - task.new_tokens or size <= task.smallest:
                return tokens, question
            size = max(size - max(size // 50, 1), task.smallest)
