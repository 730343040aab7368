"""Code blocks of the documentation that a test runs: those after a comment `<!-- run -->` or `<!-- run: WHO -->`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path


def marked(page: Path) -> Iterator[tuple[str, str]]:
    """Yields each marked block of a page in order: the user who runs it (empty: the reader), and its text.

    Raises ValueError for a mark without a code block after it.
    """
    parts = re.split(r"^<!-- run(?:: (\w+))? -->\n", page.read_text(), flags=re.MULTILINE)
    for who, rest in zip(parts[1::2], parts[2::2], strict=True):
        block = re.match(r"\n((?: {4}.*\n|\n(?= {4}))+)", rest)
        if not block:
            raise ValueError(f"{page}: no code block below a mark: {rest[:60]!r}")
        yield who or "", textwrap.dedent(block[1])
