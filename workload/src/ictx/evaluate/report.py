"""Report of all results of evaluations: Markdown, HTML, and plots beside them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment

from ictx.errors import UserError
from ictx.evaluate.results import RESULT_FILE, Result
from ictx.folder import replacing

MARKDOWN = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False).from_string("""# Evaluations

{% for section in sections %}
## {{ section.title }}

{{ section.about }}

{% for table in section.tables %}
| {{ table[0] | join(" | ") }} |
|{{ "---|" * (table[0] | length) }}
{% for row in table[1:] %}
| {{ row | map("replace", "|", "\\\\|") | join(" | ") }} |
{% endfor %}

{% endfor %}
{% for picture in section.pictures %}
![{{ section.title }}]({{ picture }})

{% endfor %}
{% endfor %}""")
HTML = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=True).from_string("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Evaluations</title>
<style>
body { font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { border: 1px solid #ccc; padding: .2rem .6rem; text-align: left }
img { max-width: 100% }
</style>
<h1>Evaluations</h1>
{% for section in sections %}
<h2>{{ section.title }}</h2>
<p>{{ section.about }}</p>
{% for table in section.tables %}
<table>
<tr>{% for cell in table[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table[1:] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
{% for picture in section.pictures %}
<img src="{{ picture }}" alt="{{ section.title }}">
{% endfor %}
{% endfor %}
</html>
""")
Table = list[list[str]]


@dataclass(frozen=True)
class Section:
    """Results of one evaluation of a model."""

    title: str
    about: str
    tables: list[Table]
    pictures: list[str]


def write(folders: Sequence[Path], out: Path) -> Path:
    """Writes the report of all results in and below the folders; returns the Markdown file. Raises UserError."""
    files = sorted({file.resolve() for folder in folders for file in folder.rglob(RESULT_FILE) if _is_result(file)})
    if not files:
        raise UserError(f"no results of `ictx eval` below {', '.join(map(str, folders))}: expected {RESULT_FILE}")
    with replacing(out) as draft:
        sections = []
        for number, file in enumerate(files, 1):
            result = Result.read(file)
            pictures = []
            for picture in sorted(file.parent.glob("*.png")):
                name = f"{number:02}-{picture.name}"
                shutil.copyfile(picture, draft / name)
                pictures.append(name)
            sections.append(_section(result, pictures))
        for name, template in (("report.md", MARKDOWN), ("report.html", HTML)):
            (draft / name).write_text(template.render(sections=sections).rstrip() + "\n")
    return out / "report.md"


def _is_result(file: Path) -> bool:
    """Returns whether a file is the result of an evaluation: the results of training stages have the same name."""
    return '"kind":' in file.read_text(errors="replace")


def _section(result: Result, pictures: list[str]) -> Section:
    date = datetime.fromtimestamp(result.created, timezone.utc).isoformat(sep=" ", timespec="minutes")
    measured = ", ".join(f"{name} {_text(value)}" for name, value in result.measured.items())
    about = f"Measured {date} ({measured})."
    if worth := result.details.get("worth"):
        about += f" {worth[0].upper()}{worth[1:]}."
    tables = [_numbers(result.metrics)]
    tables += [_rows(value) for value in result.details.values() if isinstance(value, list) and value]
    if isinstance(grades := result.details.get("grades"), Mapping):
        tables.append([["count", "value"], *([name, _text(value)] for name, value in grades.items())])
    return Section(f"{result.kind} of {result.model}", about, tables, pictures)


def _numbers(metrics: Mapping[str, Any]) -> Table:
    """Returns the metrics with their intervals."""
    table = [["metric", "value", "95 % interval"]]
    for name, value in metrics.items():
        if not name.endswith(("_low", "_high")):
            low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
            table.append([name, _text(value), f"{_text(low)} to {_text(high)}" if low is not None else ""])
    return table


def _rows(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a list of results as a table."""
    names = list(rows[0])
    return [names, *([_text(row.get(name)) for name in names] for row in rows)]


def _text(value: object) -> str:
    """Returns a value in a readable format."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
