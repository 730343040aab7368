"""`ictx kernels bench`: peers give our results; a peer that does not, or is not installed, is reported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ictx.kernels import layout
from ictx.kernels.bench import decode as bench
from ictx.kernels.bench import decode_peers
from ictx.kernels.decode import reference


def inputs(batch: int, context: int) -> bench.Inputs:
    """Returns two sets of inputs of a case on the CPU."""
    generator = torch.Generator().manual_seed(3)
    blocks = context // bench.PAGE

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    plain = [random(batch * blocks, bench.PAGE, layout.ROW) for _ in range(2)]
    table = torch.arange(batch * blocks, dtype=torch.int32).view(batch, blocks)
    lens = torch.full((batch,), context, dtype=torch.int32)
    return bench.Inputs([random(batch, 1, 16, layout.ROW) for _ in range(2)], plain, plain, table, lens)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex"])
def test_peers_attend_as_the_reference_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "flex":
        # Not compiled: the results are equal, and no C++ compiler is needed.
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        decode_peers._compiled_flex.cache_clear()
    given = inputs(2, 128)
    call = decode_peers.PEERS[name](given, bench.SCALE)
    for at in range(2):
        q, cache = given.queries[at].double(), given.plain[at].double()
        wanted, _ = reference.mla_decode(q, cache, given.lens, bench.SCALE, given.table, None)
        found = call(at).double().flatten()
        assert float((found - wanted.flatten()).norm() / wanted.norm()) <= bench.DIFFERS
    decode_peers._compiled_flex.cache_clear()


def test_every_peer_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "median_time", lambda calls: 1e-3)
    monkeypatch.setattr(bench.Inputs, "make", lambda batch, context, stored: inputs(batch, context))

    def wrong(given: bench.Inputs, scale: float) -> Callable[[int], Tensor]:
        return lambda at: given.queries[at][..., : layout.LATENT]

    def broken(given: bench.Inputs, scale: float) -> Callable[[int], Tensor]:
        raise TypeError("plan() takes 3 arguments")

    peers = {**decode_peers.PEERS, "wrong": wrong, "broken": broken}
    del peers["flex"]
    monkeypatch.setattr(bench, "PEERS", peers)
    rows = {row.implementation: row for row in bench.measure(1, 128, None, 1e12, peers=True)}
    assert list(rows) == ["ictx", *peers]
    assert rows["eager"].microseconds == pytest.approx(1000) and not rows["eager"].note
    assert rows["ictx"].share_of_copy == pytest.approx(128 * 1152 / 1e-3 / 1e12)
    for name in ("vllm triton mla", "flashmla", "flashinfer", "flashattention 3"):
        assert rows[name].microseconds is None and rows[name].note == "not installed"
    assert [row.implementation for row in bench.measure(1, 128, None, 1e12, peers=False)] == ["ictx"]
    assert "its result differs by" in rows["wrong"].note
    assert rows["broken"].note == "TypeError: plan() takes 3 arguments"
