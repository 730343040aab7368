"""The kernels use the configurations that `ictx kernels tune` writes."""

from __future__ import annotations

import functools
import json
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from ictx.errors import UserError
from ictx.infer import launches
from ictx.kernels import dispatch, tuned
from ictx.kernels.attention import tuning as attention_tuning
from ictx.kernels.attention.tuning import Tiles, attention_config
from ictx.kernels.build import offline
from ictx.kernels.decode import tuning
from ictx.kernels.decode.op import (
    SHORT,
    SHORT_QUANTISED,
    SHORT_QUANTISED_HBM3,
    SHORTEST,
    block_m_of,
    launch_of,
    mla_decode,
)
from ictx.kernels.decode.tuning import DecodeConfig
from ictx.kernels.tune import attention as attention_tune
from ictx.kernels.tune import decode as decode_tune
from ictx.kernels.tune import run as tune


def test_found_configurations_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tuned.json"
    found = DecodeConfig(block_n=16, warps=4, stages=5, programs=2)
    tuned.save(87, {"decode": {"plain/rows16": found}}, file)
    monkeypatch.setattr(tuned, "FILE", file)
    tuned.section.cache_clear()
    assert tuning.decode_config(87, 16, None) == found
    # A GPU between two targets uses the older one; configurations that were not searched are its predecessor's.
    assert tuning.decode_config(88, 16, None) == found
    assert tuning.decode_config(87, 32, "int8") == tuning.decode_config(86, 32, "int8")
    assert tuning.decode_config(86, 16, None) != found
    monkeypatch.undo()
    tuned.section.cache_clear()


def test_cards_of_fast_memory_have_configurations_of_their_own() -> None:
    """Without configurations for fast memory, those of the compute capability are used."""
    assert tuning.decode_config(90, 16, None, fast=True) != tuning.decode_config(90, 16, None)
    assert tuning.decode_config(90, 32, "int8", fast=True) == tuning.decode_config(90, 32, "int8")
    assert tuning.decode_config(80, 16, None, fast=True) == tuning.decode_config(80, 16, None)
    # A newer target uses sm_90's configurations without wgmma, which only Hopper has.
    assert tuning.decode_config(100, 16, "int8", fast=True) == tuning.decode_config(90, 16, "int8")


@pytest.mark.parametrize(("memory", "plain"), [(85e9, False), (151e9, True)])
def test_hopper_takes_its_own_products_for_quantised_caches(
    memory: float, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an H100 and on an H200, which also has other configurations for unquantised caches."""
    device = torch.device("meta")
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "_total_memory", lambda device: memory)
    monkeypatch.setattr(dispatch, "capability", lambda device: 90)
    assert launch_of(device, 16, "int8")[0].warpgroup and launch_of(device, 16, "fp8")[0].warpgroup
    assert launch_of(device, 16, None)[0] == tuning.decode_config(90, 16, None, fast=plain)
    most = SHORT_QUANTISED if plain else SHORT_QUANTISED_HBM3
    assert [launch_of(device, 16, "fp8", room=room)[0].warpgroup for room in (most, most + 1)] == [False, True]
    monkeypatch.setattr(dispatch, "capability", lambda device: 100)
    for stored in (None, "int8", "fp8"):
        assert launch_of(device, 16, stored)[0] == tuning.decode_config(90, 16, stored)


@pytest.mark.parametrize("stored", [None, "int8", "fp8"])
def test_short_caches_are_cut_up_as_on_other_cards(stored: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "capability", lambda device: 90)
    monkeypatch.setattr(dispatch, "fast_memory", lambda device, stored=None: True)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    device = torch.device("meta")
    most = SHORT_QUANTISED if stored else SHORT
    short, long = (launch_of(device, 16, stored, room=room)[0] for room in (most, most + 1))
    assert short == tuning.decode_config(90, 16, stored, case="short" if most <= SHORTEST else "") != long
    # The workspace fits the longest cache.
    assert long == tuning.decode_config(90, 16, stored, fast=True) == launch_of(device, 16, stored)[0]
    assert long.programs >= short.programs


def test_one_sequence_and_the_shortest_caches_have_configurations_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    device = torch.device("meta")
    for target, own in ((90, True), (100, False)):
        monkeypatch.setattr(dispatch, "capability", lambda device, target=target: target)
        monkeypatch.setattr(dispatch, "fast_memory", lambda device, stored=None, own=own: own)
        several, one = (launch_of(device, 16, None, batch=batch)[0] for batch in (2, 1))
        assert (one != several) == own
        # The workspace fits several sequences.
        assert one.programs <= several.programs
        monkeypatch.setattr(dispatch, "fast_memory", lambda device, stored=None: False)
        for stored in (None, "int8", "fp8"):
            short, longer = (launch_of(device, 16, stored, room=room)[0] for room in (SHORTEST, SHORTEST + 1))
            assert (short != longer) == own
            assert short.programs <= longer.programs
        # Configurations for short caches have 16 rows.
        assert launch_of(device, 32, None, room=1)[0] == launch_of(device, 32, None)[0]


def test_both_kinds_of_memory_are_compiled_for() -> None:
    """A folder of compiled kernels serves an H100 and an H200."""

    def step() -> None:
        q, cache = (torch.empty(*shape, 576, dtype=torch.bfloat16, device="meta") for shape in ((1, 1, 16), (2, 64)))
        lens, table = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((1,), (1, 512)))
        mla_decode(q, cache, lens, 0.07, table)

    with mock.patch.object(launches, "run", lambda target: step()):
        found = offline.launches(lambda: launches.drive(90), 90)
        assert sorted(launch.parameters["STAGES"] for launch in found) == [3, 4]
        assert len(offline.launches(lambda: launches.drive(80), 80)) == 1
    assert not dispatch.standing_fast


def test_every_target_knows_every_kind_of_input() -> None:
    content = json.loads(tuned.FILE.read_text("utf-8"))["decode"]
    for name in content:
        for stored in (None, "int8", "fp8"):
            if stored == "fp8" and int(name.removeprefix("sm_")) < 89:
                continue
            target = int(name.removeprefix("sm_"))
            for rows in {block_m_of(rows, target) for rows in (1, 16, 17, 128)}:
                config = tuning.decode_config(target, rows, stored)
                # Newer targets use these, so they must not use wgmma.
                assert config.warps in (4, 8) and not config.warpgroup


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_products_of_a_group_of_warps_are_fit_to_ship(stored: str, tmp_path: Path) -> None:
    config = tuning.decode_config(90, 16, stored, fast=True)
    assert config.warpgroup
    try:
        fits = functools.partial(decode_tune.decode_fits, tmp_path, target=90, stored=stored, block_m=16)
        assert fits(config)
        assert not fits(replace(config, stages=config.stages + 1)), "one more stage needs too much shared memory"
    finally:
        tuning.override = None


def test_a_kind_that_compiles_slowly_does_not_starve_the_next() -> None:
    """A search ends at its time limit, measures the compiled configurations, and cancels the others."""
    measured: list[str] = []

    def seconds(config: Any) -> float:
        measured.append(config)
        if config == "refused":
            raise RuntimeError("too many resources requested for launch")
        return {"old": 3.0, "fast": 1.0, "slow": 5.0}[config]

    kind = tune.Kind("decode", "plain/rows16", "old", [], lambda folder, config: True, lambda: seconds)
    names = ("fast", "slow", "spills", "refused", "never")
    ready: dict[Future[bool], Any] = {Future(): name for name in names}
    for future, name in ready.items():
        if name != "never":
            future.set_result(name != "spills")
    began = time.monotonic()
    assert tune.search(kind, ready, began + 0.3) == {"old": 3.0, "fast": 1.0, "slow": 5.0, "refused": float("inf")}
    assert 0.2 < time.monotonic() - began < 5
    assert measured[0] == "old" and set(measured) == {"old", "fast", "slow", "refused"}
    assert [name for future, name in ready.items() if future.cancelled()] == ["never"]


def test_kinds_of_each_target() -> None:
    names = {cc: {kind.name for kind in decode_tune.decode_kinds(cc)} for cc in (75, 80, 90)}
    assert names[75] == {"plain/rows16", "int8/rows16"}
    assert names[80] == {"plain/rows16", "plain/rows32", "int8/rows16", "int8/rows32"}
    assert names[90] == names[80] | {"fp8/rows16", "fp8/rows32"}
    fast = {kind.name for kind in decode_tune.decode_kinds(90, lambda stored: stored is not None)}
    assert fast >= {"plain/rows16", "int8/rows16/fast", "fp8/rows16/fast"}
    for cc in (75, 90):
        assert [kind.name for kind in attention_tune.attention_kinds(cc)] == ["forward", "keys_values", "queries"]


def test_found_tiles_are_saved_beside_the_decode_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tuned.json"
    tuned.save(87, {"attention": {"queries": Tiles(64, 32, 4, 2)}}, file)
    monkeypatch.setattr(tuned, "FILE", file)
    attention_tuning._tuned.cache_clear()
    assert attention_config(87) == replace(attention_config(86), queries=Tiles(64, 32, 4, 2))
    attention_tuning._tuned.cache_clear()


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        tune.main(1.0, tuned.FILE, 1)


@pytest.mark.gpu
def test_a_short_search_finds_something_for_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_tune, "CASES", [(1, 4096)])
    monkeypatch.setattr(decode_tune, "decode_candidates", lambda: [DecodeConfig(32, 4, 2, 1)])
    monkeypatch.setattr(attention_tune, "candidates", lambda name, tma: [Tiles(64, 64, 4, 2, tma)])
    assert tune.main(60.0, tmp_path / "tuned.json", 4) == 0
    content = json.loads((tmp_path / "tuned.json").read_text("utf-8"))
    major, minor = torch.cuda.get_device_capability()
    wanted = {"plain/rows16", "plain/rows32", "int8/rows16", "int8/rows32"}
    assert set(content["decode"][f"sm_{major}{minor}"]) >= wanted
    assert set(content["attention"][f"sm_{major}{minor}"]) == {"forward", "keys_values", "queries"}
    with pytest.raises(UserError, match="no such kind on this GPU: int4/rows16"):
        tune.main(60.0, tmp_path / "tuned.json", 4, ["int4/rows16"])
