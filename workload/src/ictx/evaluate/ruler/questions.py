"""Questions about documents (section 3, Question Answering), those of this machine unless a file has others.

SQuAD and HotpotQA cannot be had without a network. Python's own modules can: a function's docstring is a document. In
one step the question quotes it and requests the function's name; in two it requests another document's description
of the module that this function is in. A file of JSON lines `{"question", "answers", "context"}` replaces both.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import NamedTuple

from ictx.errors import UserError
from ictx.evaluate.ruler.task import Material, Question
from ictx.folder import read_text

PROMPT = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other "
    "words.\n\nThe following are given documents.\n\n{text}\n\nAnswer the question based on the given documents. "
    "Only give me the answer and do not output any other words.\n\nQuestion: {query}"
)
PREFIX = " Answer:"


class Asked(NamedTuple):
    """A question about documents."""

    query: str
    answers: list[str]
    documents: list[str]
    """That hold the answer."""


@dataclass(frozen=True)
class Documents:
    """Questions and the documents among which the answers are."""

    asked: Sequence[Asked]

    @cached_property
    def all(self) -> list[str]:
        """Every document once."""
        return list(dict.fromkeys(document for each in self.asked for document in each.documents))

    def __call__(self, draw: Random, _: Material, size: int) -> Question:
        """Returns a question with `size` documents, the right ones among them."""
        asked = draw.choice(self.asked)
        own = set(asked.documents)
        start = draw.randrange(len(self.all))
        others = (document for document in islice(cycle(self.all), start, None) if document not in own)
        chosen = asked.documents + list(islice(others, size - len(asked.documents)))
        draw.shuffle(chosen)
        text = "\n\n".join(f"Document {place}:\n{document}" for place, document in enumerate(chosen, 1))
        return Question(PROMPT.format(text=text, query=asked.query), PREFIX, asked.answers)


def read(file: Path) -> Documents:
    """Returns the questions in a file of JSON lines. Raises UserError naming the line that is wrong."""
    asked = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        try:
            row = json.loads(line)
            question, answers, context = row["question"], row["answers"], row["context"]
            contexts = [context] if isinstance(context, str) else list(context)
            if not all(isinstance(text, str) and text for text in (question, *answers, *contexts)) or not answers:
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            expected = 'expected {"question": text, "answers": [text, …], "context": text or [text, …]}'
            raise UserError(f"{file} line {number}: {expected}") from error
        asked.append(Asked(question, list(answers), contexts))
    return _enough(asked, str(file))


def local(folder: Path | None = None) -> tuple[Documents, Documents]:
    """Returns questions of one step and of two about modules in a folder, Python's own unless given."""
    one, two = [], []
    folder = folder or Path(sysconfig.get_path("stdlib"))
    for file in sorted(folder.glob("*.py")):
        try:
            module = ast.parse(file.read_text("utf-8"))
        except (ValueError, SyntaxError):
            continue
        about = _first_paragraph(module)
        functions = [
            (node.name, text)
            for node in module.body
            if isinstance(node, ast.FunctionDef) and node.name[0] != "_" and (text := _first_paragraph(node))
        ]
        for name, text in functions:
            document = f"Function {name}\nThe function {name} is in the module {file.stem}. Its description: {text}"
            one.append(Asked(f"Which function has the description: {text}", [name], [document]))
            if about:
                other = f"Module {file.stem}\nThe module {file.stem} has the summary: {about}"
                question = f"What is the summary of the module that the function {name} is in?"
                two.append(Asked(question, [about], [document, other]))
    return _enough(one, str(folder)), _enough(two, str(folder))


def _first_paragraph(node: ast.Module | ast.FunctionDef) -> str:
    """Returns the first paragraph of a docstring in one line, empty where there is none or a long one."""
    text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    return text if 15 <= len(text) <= 400 else ""


def _enough(asked: list[Asked], origin: str) -> Documents:
    """Returns the questions. Raises UserError where a question has all documents: there is nothing to look through."""
    found = Documents(asked)
    if len(found.all) <= max((len(each.documents) for each in asked), default=0):
        raise UserError(
            f"{origin} has {len(asked)} questions about {len(found.all)} documents: expected more documents"
        )
    return found
