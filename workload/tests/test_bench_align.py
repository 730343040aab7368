"""`ictx bench align` measures equal work in our loop and in TRL's trainers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Commands


@pytest.mark.full
@pytest.mark.parametrize("task", ["dpo", "sft"])
def test_rows(commands: Commands, tmp_path: Path, task: str) -> None:
    out = tmp_path / "rows.json"
    shape = ("--config", "tiny", "--seq", 64, "--steps", 1, "--warm-up", 1)
    ended = commands.run("bench", "align", "--task", task, *shape, "--out", out)
    assert ended.status == 0, ended.err
    rows = {row["implementation"]: row for row in json.loads(out.read_text())}
    assert set(rows) == {"trl", "trl+ictx", "ictx"}
    assert not any(row["note"] for row in rows.values())
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    # Only attention differs.
    assert rows["trl"]["loss"] == pytest.approx(rows["trl+ictx"]["loss"], rel=1e-4)
