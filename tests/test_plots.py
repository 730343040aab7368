"""The documentation's plots are up to date with the tables on the same pages."""

from __future__ import annotations

import re
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from cluster import ROOT
from programs import loaded

plots = loaded(ROOT / "scripts/plots")
PAGE = """\
text

<!-- plot: training -->

| 32,768 tokens | s/step | tokens/s |
|---|---|---|
| none | 1.040 | **63,004** |
| theirs | | – |

| another | table |
|---|---|
"""


def test_a_marked_table_ends_where_its_lines_end() -> None:
    table = plots.tables(PAGE)["training"]
    assert table == [["32,768 tokens", "s/step", "tokens/s"], ["none", "1.040", "63,004"], ["theirs", "", "–"]]
    assert plots.column(table, "tokens/s") == [63004.0, None]
    with pytest.raises(ValueError, match="plot training: no table follows"):
        plots.tables("<!-- plot: training -->\n\ntext")
    with pytest.raises(ValueError, match="no column 'seconds'"):
        plots.column(table, "seconds")


def test_a_plot_shows_what_its_table_has(tmp_path: Path) -> None:
    plots.draw("training", plots.tables(PAGE)["training"], tmp_path / "training.svg")
    texts = [node.text for node in ET.parse(tmp_path / "training.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {"none", "63,004"} <= set(texts)
    assert "theirs" not in texts


def test_a_table_that_changed_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {name: (ROOT / "docs" / name).read_text() for name in ("benchmarks.md", "training.md")}
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(plots, "DOCS", tmp_path)
    monkeypatch.setattr("sys.argv", ["plots", "--check"])
    assert plots.main() == 0
    (tmp_path / "benchmarks.md").write_text(re.sub(r"61\.4 µs", "51.4 µs", pages["benchmarks.md"], count=1))
    assert plots.main() == 1


def test_the_pages_show_every_plot() -> None:
    shown = subprocess.run(
        ["git", "grep", "-hoE", r"images/plots/[a-z-]+\.svg", "--", "docs/*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert sorted(shown) == [f"images/plots/{name}.svg" for name in sorted(plots.PLOTS)]
