"""Marked code blocks are found in the order of the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from blocks import marked
from cluster import ROOT

PAGE = """# Page

    not run

<!-- run -->

    one
    two <<'X'
      indented

    X

Text.

<!-- run: researcher -->

    three

    # four
"""


def test_blocks_below_a_mark_are_yielded_in_order_without_their_indent(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert list(marked(page)) == [
        ("", "one\ntwo <<'X'\n  indented\n\nX\n"),
        ("researcher", "three\n\n# four\n"),
    ]
    page.write_text("<!-- run -->\n\nno block\n")
    with pytest.raises(ValueError, match="no code block below a mark"):
        list(marked(page))


def test_the_newcomers_path_leads_from_a_clone_to_a_model_that_is_served_and_back() -> None:
    text = [block for _, block in marked(ROOT / "docs/first-hour.md")]
    order = ["git clone", "make lab", "sbatch", "ictx promote", "serving.yml", "upgrade.yml", "make down"]
    found = ["".join(text).index(command) for command in order]
    assert found == sorted(found)
