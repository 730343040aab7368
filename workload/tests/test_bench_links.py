"""`ictx bench links`: the schedule of pairs, and the result of ranks on several nodes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from conftest import Commands

from ictx.bench.pairs import rounds


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 32])
def test_every_two_meet_once_and_nobody_meets_two_at_a_time(count: int) -> None:
    found = list(rounds(count))
    assert sorted(itertools.chain(*found)) == list(itertools.combinations(range(count), 2))
    for each in found:
        busy = list(itertools.chain(*each))
        assert len(busy) == len(set(busy)) >= count - 1
    assert len(found) == count - 1 + count % 2


@pytest.mark.full
def test_ranks_of_three_nodes_measure_their_links(commands: Commands, tmp_path: Path) -> None:
    out = tmp_path / "reports/links.json"
    names = ["a", "a", "b", "c"]
    ranks = commands.ranks(
        4, "bench", "links", "--size-mb", 1, "--times", 2, "--out", out, each=[{"SLURMD_NODENAME": n} for n in names]
    )
    ended = [commands.end(rank) for rank in ranks]
    assert [rank.status for rank in ended] == [0] * 4, ended
    found = json.loads(out.read_text())
    assert (found["backend"], found["ranks"], found["nodes"]) == ("gloo", 4, ["a", "b", "c"])
    assert sorted(pair[:2] for pair in found["pairs"]) == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert set(found["inside"]) == {"a"}
    assert all(bandwidth > 1e5 for bandwidth in [found["together"], *(pair[2] for pair in found["pairs"])])
    # All ranks use this machine's clock.
    assert set(found["clocks"]) == {"b", "c"}
    assert all(abs(offset) <= bound + 1e-3 for offset, bound in found["clocks"].values())
    assert "4 ranks on 3 nodes, gloo" in ended[0].out


@pytest.mark.full
def test_one_rank_is_refused(commands: Commands) -> None:
    ended = commands.run("bench", "links")
    assert ended.status == 2 and "there is only one rank" in ended.err and "Traceback" not in ended.err
