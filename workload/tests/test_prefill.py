"""`mla_prefill` agrees with float64 in every mode, in Triton's interpreter and on a GPU if available."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreter import passes_interpreted
from torch import Tensor

from ictx.kernels import dispatch, layout
from ictx.kernels.prefill.op import cost, mla_prefill

BOUND = {torch.float16: 2e-3, torch.bfloat16: 8e-3}
SCALE = 0.07


def inputs(
    new: int, length: int, heads: int, page: int, nope: int = 128, value: int = 128,
    dtype: torch.dtype = torch.float16, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Returns random queries, weights and cache, with NaN beyond the sequence's end, as in freed memory."""
    generator = torch.Generator(device).manual_seed(length)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    blocks = -(-length // page) if page else 1
    table = torch.randperm(blocks + 1, device=device, generator=generator)[:blocks].to(torch.int32) if page else None
    cache = torch.full((blocks + 1, page or length + 3, layout.ROW), torch.nan, dtype=dtype, device=device)
    for first in range(0, length, page or length):
        place = 0 if table is None else int(table[first // page])
        cache[place, : length - first] = random(min(length - first, page or length), layout.ROW)
    weight = random(heads * (nope + value), layout.LATENT) * layout.LATENT**-0.5
    query = random(new, heads, nope + 64)
    return {"q": query, "cache": cache, "length": length, "w_kv": weight, "scale": SCALE, "table": table}


def expected(given: dict[str, Any]) -> Tensor:
    """Returns the float64 result from the definition."""
    q, length, table = given["q"].double(), given["length"], given["table"]
    rows = (given["cache"][0] if table is None else given["cache"][table.long()].flatten(0, 1))[:length].double()
    nope = q.shape[-1] - 64
    kv = (rows[:, :512] @ given["w_kv"].double().T).unflatten(-1, (q.shape[1], -1))
    score = torch.einsum("qhn,khn->hqk", q[..., :nope], kv[..., :nope])
    score = (score + torch.einsum("qhr,kr->hqk", q[..., nope:], rows[:, 512:])) * SCALE
    places = torch.arange(length, device=q.device)
    score = score.masked_fill(places > places[length - len(q) :, None], -torch.inf)
    return torch.einsum("hqk,khv->qhv", score.softmax(-1), kv[..., nope:])


def agrees(given: dict[str, Any], **knobs: Any) -> None:
    found, wanted = mla_prefill(**given, **knobs), expected(given)
    assert found.shape == wanted.shape and found.dtype == given["q"].dtype
    assert torch.isfinite(found).all()
    assert float((found.double() - wanted).norm() / wanted.norm()) <= BOUND[found.dtype]


SMALL = 2 * 2 * 256 * 64
"""Bytes of two heads of 64 expanded tokens."""
CASES = [
    pytest.param((17, 100, 2, 16), {"mode": "expanded"}, id="in one part"),
    pytest.param((33, 130, 2, 0), {"mode": "expanded", "workspace": SMALL}, id="in parts, contiguous"),
    pytest.param((5, 70, 2, 16), {"mode": "expanded", "workspace": 1}, id="in the least parts"),
    pytest.param((40, 40, 1, 64), {"mode": "expanded", "workspace": SMALL}, id="no prefix"),
    pytest.param((3, 50, 1, 16, 32, 24), {"mode": "expanded", "workspace": SMALL}, id="padded columns"),
    pytest.param((11, 75, 2, 16), {"mode": "absorbed"}, id="absorbed, two slices"),
    pytest.param((1, 65, 2, 0), {"mode": "absorbed"}, id="absorbed, one token, contiguous"),
]


@pytest.mark.parametrize(("sizes", "knobs"), CASES)
def test_prefill_agrees_in_the_interpreter(sizes: tuple[int, ...], knobs: dict[str, Any]) -> None:
    if not dispatch.interpreted():
        pytest.skip("runs with TRITON_INTERPRET=1")
    agrees(inputs(*sizes), **knobs)


def test_interpreted_cases_pass_in_a_process_of_their_own() -> None:
    passes_interpreted(__file__, "7 passed", "-k", "interpreter")


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize(("sizes", "knobs"), CASES)
def test_the_fallback_agrees(
    sizes: tuple[int, ...], knobs: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    agrees(inputs(*sizes, dtype=dtype), **knobs)


def test_no_new_tokens() -> None:
    assert mla_prefill(**inputs(0, 5, 2, 16)).shape == (0, 2, 128)


def test_few_queries_are_absorbed_and_many_expanded() -> None:
    # Measured on an H100 with 131,072 tokens: 64 queries 3.4 ms and 3.8 ms, 128 queries 6.3 ms and 3.9 ms.
    for new, absorbed in ((1, True), (64, True), (128, False), (8192, False)):
        estimate = cost(new, 131_072, 16, 128, 64, 128)
        assert (estimate.absorbed < estimate.expanded) is absorbed
    # Computed by hand: 2·10·512·2/0.8 + 2·256·10·3/0.6 and 2·512·2/0.8 + 2·10·1025/0.12.
    assert cost(1, 10, 1, 1, 1, 1, 2) == pytest.approx((51_200.0, 2_560.0 + 20_500 / 0.12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(9, 2, 192, dtype=torch.float16)}, "q is"),
        ({"cache": torch.zeros(1, 64, 576)}, "cache is"),
        ({"w_kv": torch.zeros(511, 512, dtype=torch.float16)}, "w_kv is"),
        ({"length": 81}, "hold 16 tokens"),
        ({"table": torch.zeros(1)}, "table"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mla_prefill(**(inputs(3, 7, 2, 16) | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize(
    ("sizes", "knobs"),
    [
        *CASES,
        pytest.param((4095, 4097, 16, 64), {}, id="long"),
        pytest.param((513, 20000, 16, 64), {"workspace": 1 << 25}, id="in parts"),
        pytest.param((100, 20000, 16, 16), {"mode": "absorbed"}, id="absorbed"),
    ],
)
def test_prefill_agrees_on_a_gpu(sizes: tuple[int, ...], knobs: dict[str, Any], dtype: torch.dtype) -> None:
    agrees(inputs(*sizes, dtype=dtype, device="cuda"), **knobs)
