"""Questions about documents (section 3, Question Answering), generated locally or read from a file.

SQuAD and HotpotQA require a network. Instead, the docstrings of Python's own modules are documents. A question of one
step quotes a function's docstring and requests its name; a question of two steps requests the summary of the function's
module, which is in another document. A file of JSON lines `{"question", "answers", "context"}` replaces both.
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
    """Documents with the answer."""


@dataclass(frozen=True)
class Documents:
    """Questions and the pool of their documents."""

    asked: Sequence[Asked]

    @cached_property
    def all(self) -> list[str]:
        """All distinct documents."""
        return list(dict.fromkeys(document for each in self.asked for document in each.documents))

    def __call__(self, draw: Random, _: Material, size: int) -> Question:
        """Returns a question with `size` documents, including those with the answer."""
        asked = draw.choice(self.asked)
        own = set(asked.documents)
        start = draw.randrange(len(self.all))
        others = (document for document in islice(cycle(self.all), start, None) if document not in own)
        chosen = asked.documents + list(islice(others, size - len(asked.documents)))
        draw.shuffle(chosen)
        text = "\n\n".join(f"Document {place}:\n{document}" for place, document in enumerate(chosen, 1))
        return Question(PROMPT.format(text=text, query=asked.query), PREFIX, asked.answers)


def read(file: Path) -> Documents:
    """Returns the questions in a JSON lines file. Raises UserError with the number of an invalid line."""
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
    """Returns questions of one step and of two steps about modules in a folder; default: Python's own modules."""
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
    """Returns the first paragraph of a docstring in one line; empty unless it has 15 to 400 characters."""
    text = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
    return text if 15 <= len(text) <= 400 else ""


def _enough(asked: list[Asked], origin: str) -> Documents:
    """Returns the questions. Raises UserError if one of them has all documents: none would be left as a distractor."""
    found = Documents(asked)
    if len(found.all) <= max((len(each.documents) for each in asked), default=0):
        raise UserError(
            f"{origin} has {len(asked)} questions about {len(found.all)} documents: expected more documents"
        )
    return found
