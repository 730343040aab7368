"""Age of the hosts' journals: an invalid journal affects only the metrics of its own host."""

from __future__ import annotations

import sys
import types
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT
from programs import loaded


class Reader:
    """Replaces systemd's reader, a package of the nodes: the file's text is the time of the journal's last line."""

    def __init__(self, files: list[str]) -> None:
        self.text = "".join(Path(file).read_text() for file in files)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def seek_tail(self) -> None:
        """Does nothing, as there is one line."""

    def get_previous(self) -> dict[str, Any]:
        """Returns the line."""
        return {"__REALTIME_TIMESTAMP": datetime.fromtimestamp(int(self.text) / 1e6)}


@pytest.fixture(scope="module")
def program() -> types.ModuleType:
    """Returns the program as a module."""
    folder = types.ModuleType("systemd")
    folder.journal = types.ModuleType("systemd.journal")
    folder.journal.Reader = Reader
    sys.modules |= {"systemd": folder, "systemd.journal": folder.journal}
    return loaded(ROOT / "roles/journal/files/ictx-journal-metrics")


@pytest.mark.parametrize("microseconds", [2**63, 10**18, 10**30])
def test_a_time_beyond_all_calendars_costs_its_own_host_only(
    program: types.ModuleType, tmp_path: Path, microseconds: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "remote-evil.journal").write_text(str(microseconds))
    (tmp_path / "remote-n1.journal").write_text("1700000000000000")
    found = {(name, label): value for name, label, value in program.received(tmp_path)}
    assert found[program.RECEIVED, '{node="n1"}'] == 1700000000
    assert (program.RECEIVED, '{node="evil"}') not in found
    assert "evil" in capsys.readouterr().err
