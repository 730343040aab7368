"""MkDocs hook: generates the reference pages from their sources.

Pages: roles (argument specs and defaults), variables of an inventory, configuration of runs (dataclasses), commands
(`ictx --help`), programs of nodes and scripts, alerts and recording rules, metrics of our exporters, charts.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
WORKLOAD = ROOT / "workload/src"
MADE = "<!-- Made by docs/hooks/reference.py -->\n\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of the reference. Raises KeyError, OSError or SyntaxError where a source cannot be read."""
    for path, text in pages():
        files.append(File.generated(config, f"reference/{path}", content=MADE + text))
    return files


def pages() -> Iterator[tuple[str, str]]:
    """Yields each page: its path below reference/ and its text."""
    yield "roles.md", roles()
    yield "inventory.md", inventory()
    yield "configuration.md", configuration()
    yield "commands.md", commands()
    yield "programs.md", programs()
    yield "alerts.md", alerts()
    yield "metrics.md", metrics()
    for readme in sorted(ROOT.glob("charts/*/README.md")):
        yield f"chart-{readme.parent.name}.md", readme.read_text()


def cell(value: Any) -> str:
    """Returns a value as the cell of a table."""
    text = (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n")
    )
    text = " ".join(re.sub(r"[CLMOV]\(([^)]*)\)", r"`\1`", text).split())
    return text.replace("|", "\\|").replace("<", "&lt;").replace("{{", "&#123;&#123;")


def code(value: Any) -> str:
    """Returns a default as code in the cell of a table; nothing for None."""
    if value is None:
        return ""
    text = value if isinstance(value, str) and value else yaml.safe_dump(value, default_flow_style=True, width=10**6)
    text = " ".join(text.removesuffix("...\n").split()).replace("`", "'")
    return f"`{text if len(text) <= 80 else text[:77] + '...'}`"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Returns a table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n\n"


def options(spec: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> list[tuple[str, ...]]:
    """Returns the rows of options of an argument spec, those within others too."""
    rows = []
    for name, option in spec.items():
        kind = option.get("type", "str") + (f" of {option['elements']}" if "elements" in option else "")
        choices = f" One of {', '.join(f'`{choice}`' for choice in option['choices'])}." if "choices" in option else ""
        default = "required" if option.get("required") else code(defaults.get(name, option.get("default")))
        rows.append((f"`{prefix}{name}`", kind, default, cell(option.get("description", "")) + choices))
        rows += options(option.get("options", {}), {}, f"{prefix}{name}.")
    return rows


OPTIONS = ("variable", "type", "default", "meaning")


def roles() -> str:
    """Returns the page of roles."""
    paths = sorted(ROOT.glob("roles/*/meta/argument_specs.yml"))
    text = [
        "# Roles\n\nVariables of each role, with defaults. `playbooks/preflight.yml` validates them on every run.\n\n"
    ]
    text += [f"## {path.parents[1].name}\n\n{role(path.parents[1])}" for path in paths]
    return "".join(text)


def role(folder: Path) -> str:
    """Returns the purpose and the variables of a role."""
    spec = yaml.safe_load((folder / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]
    file = folder / "defaults/main.yml"
    defaults = (yaml.safe_load(file.read_text()) if file.exists() else None) or {}
    rows = options(spec.get("options", {}), defaults)
    return f"{spec['short_description']}.\n\n" + (table(OPTIONS, rows) if rows else "")


def inventory() -> str:
    """Returns the page of an inventory's variables that are no role's, and of the formats that text must have."""
    schema = yaml.safe_load((ROOT / "playbooks/plugins/inventory_schema.yml").read_text())
    formats = yaml.safe_load((ROOT / "playbooks/plugins/inventory_formats.yml").read_text())["formats"]
    rows = [(f"`{name}`", cell(entry["description"])) for name, entry in sorted(formats.items())]
    return (
        "# Inventory\n\nVariables of the whole cluster, the same on every host. Those of roles: [Roles](roles.md).\n\n"
        + table(OPTIONS, options(schema["variables"], {}))
        + "## Formats\n\nWhat preflight accepts as text and numbers, by the name of the format.\n\n"
        + table(("format", "accepted"), rows)
    )


def fields(node: ast.ClassDef) -> list[tuple[str, ...]]:
    """Returns the rows of a dataclass: each field, its type, its default and the text below it."""
    rows = []
    for field, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = str(following.value.value)
        default = (
            "required"
            if field.value is None
            else code(re.sub(r"field\(default_factory=(\w+)\)", r"\1()", ast.unparse(field.value)))
        )
        kind = ast.unparse(field.annotation)
        rows.append((f"`{field.target.id}`", f"`{kind}`", default, cell(text)))
    return rows


def configuration() -> str:
    """Returns the page of configuration files: the dataclasses that they are read into."""
    text = [
        "# Configuration of runs\n\nFields of the files in `workload/configs`; `SECTION.FIELD=VALUE` on the command "
        "line overrides one.\n\n"
    ]
    for path in sorted(WORKLOAD.glob("ictx/**/*config.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(mark) for mark in node.decorator_list):
                summary = cell(ast.get_docstring(node) or "")
                text.append(
                    f"## {node.name}\n\n{summary}\n\n{table(('field', 'type', 'default', 'meaning'), fields(node))}"
                )
    return "".join(text)


def helps(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yields the name and the help of a command and of all below it."""
    yield parser.prog, parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in dict.fromkeys(action.choices.values()):
                yield from helps(below)


def commands() -> str:
    """Returns the page of the commands: what `--help` prints."""
    os.environ["COLUMNS"] = "110"
    sys.path.insert(0, str(WORKLOAD))
    try:
        from ictx.cli import parser
    finally:
        sys.path.remove(str(WORKLOAD))
    text = ["# Commands\n\nWhat `--help` prints. In a job and on a login node: `/opt/ictx/bin/ictx`.\n\n"]
    text += [
        f"{'##' if name.count(' ') < 2 else '###'} {name}\n\n```text\n{text}```\n\n" for name, text in helps(parser())
    ]
    return "".join(text)


def head(path: Path) -> str:
    """Returns what a program's file begins with: the docstring, or the comment of a shell script."""
    text = path.read_text()
    if "python" in text.partition("\n")[0]:
        return (ast.get_docstring(ast.parse(text)) or "") + "\n"
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()[1:])
    return "".join(f"{line[2:]}\n" for line in lines if "shellcheck" not in line)


def programs() -> str:
    """Returns the page of the programs that roles install on nodes, and of the repository's scripts."""
    installed = sorted(ROOT.glob("roles/*/files/ictx-*"), key=lambda path: path.name)
    scripts = [path for path in sorted(ROOT.glob("scripts/*")) if os.access(path, os.X_OK)]
    text = ["# Programs and scripts\n\n## On nodes\n\nIn `/opt/ictx/bin`, from the roles' files.\n\n"]
    text += [f"### {path.name}\n\nRole `{path.parts[-3]}`.\n\n```text\n{head(path)}```\n\n" for path in installed]
    text.append("## In the repository\n\nPrinted by `--help`, too.\n\n")
    text += [f"### scripts/{path.name}\n\n```text\n{head(path)}```\n\n" for path in scripts]
    return "".join(text)


def alerts() -> str:
    """Returns the page of alerts and of recording rules."""
    text = ["# Alerts and recording rules\n\n"]
    records = []
    for path in sorted(ROOT.glob("roles/prometheus/templates/rules/*.yml*")):
        rows = []
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                if "record" in rule:
                    records.append((f"`{rule['record']}`", code(rule["expr"])))
                    continue
                link = f"[{rule['alert']}](../runbooks/{rule['alert']}.md)"
                rows.append(
                    (link, rule["labels"]["severity"], str(rule.get("for", "")), cell(rule["annotations"]["summary"]))
                )
        if rows:
            text.append(
                f"## {path.name.split('.')[0]}\n\n" + table(("alert and runbook", "severity", "for", "summary"), rows)
            )
    return "".join(text) + "## Recording rules\n\n" + table(("metric", "expression"), records)


def metrics() -> str:
    """Returns the page of the metrics that our own programs expose."""
    rows = set()
    for path in (path for path in ROOT.glob("roles/*/files/**/*") if path.is_file()):
        try:
            tree = ast.parse(path.read_text())
        except (SyntaxError, ValueError):
            continue  # no program in Python
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            texts = [part.value for part in call.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if name in ("declare", "Gauge", "GaugeMetricFamily") and len(texts) >= 2:
                labels = ", ".join(f"`{label}`" for label in texts[2:])
                rows.add((f"`{texts[0]}`", labels, cell(texts[1]), f"`{path.relative_to(ROOT / 'roles').parts[0]}`"))
    return "# Metrics\n\nWhat our own exporters expose, besides those of the programs that we install.\n\n" + table(
        ("metric", "labels", "meaning", "role"), sorted(rows)
    )
