"""What `ictx kernels tune` writes is what the kernels then use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ictx.errors import UserError
from ictx.kernels import tune, tuning
from ictx.kernels.decode import block_m_of
from ictx.kernels.tuning import DecodeConfig


def test_found_configurations_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tuned.json"
    found = DecodeConfig(block_n=16, warps=4, stages=5, programs=2)
    tuning.save_decode(87, {"plain/rows16": found}, file)
    monkeypatch.setattr(tuning, "FILE", file)
    tuning.table.cache_clear()
    assert tuning.decode_config(87, 16, None) == found
    # A card between two targets takes the older one; what was not searched is what its predecessor had.
    assert tuning.decode_config(88, 16, None) == found
    assert tuning.decode_config(87, 32, "int8") == tuning.decode_config(86, 32, "int8")
    assert tuning.decode_config(86, 16, None) != found
    monkeypatch.undo()
    tuning.table.cache_clear()


def test_every_target_knows_every_kind_of_input() -> None:
    content = json.loads(tuning.FILE.read_text("utf-8"))["decode"]
    for name in content:
        for stored in (None, "int8", "fp8"):
            if stored == "fp8" and int(name.removeprefix("sm_")) < 89:
                continue
            target = int(name.removeprefix("sm_"))
            for rows in {block_m_of(rows, target) for rows in (1, 16, 17, 128)}:
                assert tuning.decode_config(target, rows, stored).warps in (4, 8)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        tune.main(1.0, tuning.FILE, 1)


@pytest.mark.gpu
def test_a_short_search_finds_something_for_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "CASES", [(1, 4096)])
    monkeypatch.setattr(tune, "candidates", lambda: iter([DecodeConfig(32, 4, 2, 1)]))
    assert tune.main(60.0, tmp_path / "tuned.json", 4) == 0
    content = json.loads((tmp_path / "tuned.json").read_text("utf-8"))["decode"]
    major, minor = torch.cuda.get_device_capability()
    assert set(content[f"sm_{major}{minor}"]) >= {"plain/rows16", "plain/rows32", "int8/rows16", "int8/rows32"}
