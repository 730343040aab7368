"""The watchdog reports which of the waiting ranks hangs."""

from __future__ import annotations

import json
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ictx.train import watchdog
from ictx.train.watchdog import Watchdog


class Store:
    """The job's key-value store, in this process."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def clone(self) -> Store:
        return self

    def set_timeout(self, _: Any) -> None: ...

    def set(self, key: str, value: Any) -> None:
        self.values[key] = value

    def get(self, key: str) -> Any:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


class First:
    """The first of three ranks."""

    rank, count, device = 0, 3, torch.device("cpu")


@pytest.mark.parametrize(
    ("second", "third", "wanted"),
    [
        (
            ("forward", 3, False),
            ("backward", 4, True),
            "rank 1 on n1 (forward of step 7) does not respond, and the others",
        ),
        (
            ("data", 2, True),
            ("backward", 4, True),
            "rank 1 on n1 (data of step 7) is behind, and the others wait in back",
        ),
        (("backward", 4, True), ("backward", 4, True), "all ranks wait in backward of step 7"),
        (
            ("data", 2, True),
            ("data", 2, True),
            "rank 1 on n1 (data of step 7), rank 2 on n2 (data of step 7) is behind",
        ),
    ],
)
def test_the_rank_that_hangs_is_named(
    second: tuple[str, int, bool],
    third: tuple[str, int, bool],
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store, over = Store(), threading.Event()
    monkeypatch.setattr(watchdog, "_get_default_store", lambda: store)

    def others() -> None:
        number = 0
        while not over.wait(0.01):
            number += 1
            for rank, (doing, moves, alive) in ((1, second), (2, third)):
                if alive or number == 1:
                    store.set(f"ictx/watchdog/{rank}", json.dumps([f"n{rank}", 7, doing, moves, number]))

    thread = threading.Thread(target=others)
    thread.start()
    ranks: Any = First()
    watched = Watchdog(ranks, 1.0, tmp_path / "hang")
    try:
        for doing in ("data", "forward", "data", "backward"):
            watched.at(7, doing)
        while not watched.verdict:
            time.sleep(0.05)
    finally:
        over.set()
        thread.join()
        watched.close()
    assert wanted in watched.verdict
    assert watched.verdict in capsys.readouterr().out
    assert "File " in (tmp_path / "hang" / "rank-00000.stacks").read_text()
    assert "entries" in pickle.loads((tmp_path / "hang" / "rank-00000.flight").read_bytes())


def test_a_rank_that_moves_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    monkeypatch.setattr(watchdog, "_get_default_store", lambda: store)
    ranks: Any = First()
    watched = Watchdog(ranks, 1.0, tmp_path / "hang")
    for step in range(40):
        watched.at(step, "forward")
        time.sleep(0.05)
    watched.close()
    assert not watched.verdict
    assert not (tmp_path / "hang").exists()
