"""The kernels agree with a float64 reference, in Triton's interpreter on a CPU, and on a GPU if available.

With `-m gpu` they also run in bfloat16, and with lengths that are too slow for a CPU.
"""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from interpreter import passes_interpreted
from torch import Tensor

from ictx.errors import UserError
from ictx.kernels import dispatch, layout
from ictx.kernels.decode import reference
from ictx.kernels.decode.op import block_m_of, mla_decode
from ictx.kernels.decode.tuning import DecodeConfig, decode_config

BOUND = {torch.float16: 2e-3, torch.bfloat16: 8e-3}
SCALE = 0.06
STEP = {
    # The largest of 128 normal values is 2.8 on average, and int8 has 127 steps up to it; rounding to a step errs by
    # 1/√12 of it (root mean square of what is uniform in half a step on either side).
    "int8": 2.8 / 127 / 12**0.5,
    # e4m3 has 8 steps to a power of two: 2^-3/√12 of the power below a value. A value is √(3 / (2 ln 2)) times the
    # power below it (root mean square, its logarithm uniform between two powers).
    "fp8": 2**-3 / 12**0.5 / (3 / (2 * math.log(2))) ** 0.5,
}
"""Relative error of a stored value of random normal rows, root mean square."""
SCORE = {stored: SCALE * 512**0.5 * step for stored, step in STEP.items()}
"""Resulting error of a score, a sum of 512 products with normal queries; it is the weight's relative error."""
STORED_BOUND = {stored: 1.1 * math.hypot(STEP[stored], SCORE[stored]) for stored in STEP}
"""Relative error of the result against the unquantised cache: the errors of values and weights are independent, and
average over tokens as the result does. The factor 1.1 is a tolerance. (int8 1.19e-2, fp8 4.6e-2.)"""


def inputs(
    lens: list[int],
    heads: int,
    query: int,
    page: int,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Returns random queries and cache, with NaN beyond the end of sequences, as in freed memory."""
    generator = torch.Generator(device).manual_seed(seed)
    q = torch.randn(len(lens), query, heads, layout.ROW, dtype=dtype, device=device, generator=generator)
    if page:
        needed = [-(-length // page) for length in lens]
        order = torch.randperm(sum(needed) + 1, device=device, generator=generator).to(torch.int32)
        table = torch.zeros(len(lens), max(needed) + 1, dtype=torch.int32, device=device)
        cache = torch.full((sum(needed) + 1, page, layout.ROW), torch.nan, dtype=dtype, device=device)
        first = 0
        for index, count in enumerate(needed):
            table[index, :count] = order[first : first + count]
            first += count
    else:
        table = None
        cache = torch.full((len(lens), max(*lens, 1), layout.ROW), torch.nan, dtype=dtype, device=device)
    for index, length in enumerate(lens):
        rows = torch.randn(length, layout.ROW, dtype=dtype, device=device, generator=generator)
        if table is None:
            cache[index, :length] = rows
        else:
            for at in range(0, length, page):
                cache[table[index, at // page], : length - at] = rows[at : at + page]
    return {
        "q": q,
        "cache": cache,
        "lens": torch.tensor(lens, dtype=torch.int32, device=device),
        "scale": SCALE,
        "table": table,
    }


def expected(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns the float64 result for the unquantised rows."""
    return reference.mla_decode(
        given["q"].double(), given["cache"].double(), given["lens"], given["scale"], given["table"], None
    )


def error(found: Tensor, wanted: Tensor) -> float:
    """Returns ‖found − wanted‖ / ‖wanted‖, or ‖found‖ if `wanted` is zero."""
    return float((found.double() - wanted).norm() / (wanted.norm() or 1.0))


def agrees(given: dict[str, Any], stored: str | None = None, config: DecodeConfig | None = None) -> None:
    """Runs the kernel twice with one workspace and an output of NaN, and compares."""
    q = given["q"]
    wanted, wanted_lse = expected(given)
    kept = wanted
    if stored:
        clean = given["cache"].nan_to_num(0.0)
        given = {**given, "cache": layout.quantise(clean, stored), "stored": stored}
        # The kernel must compute with exactly the stored values.
        kept, _ = expected({**given, "cache": layout.dequantise(given["cache"], stored, q.dtype)})
    for _ in range(2):
        out = torch.full((*q.shape[:3], layout.LATENT), torch.nan, dtype=q.dtype, device=q.device)
        found, lse = mla_decode(**given, out=out, config=config)
        assert found is out
        assert torch.isfinite(found).all()
        assert error(found, kept) <= BOUND[q.dtype]
        assert not stored or error(found, wanted) <= STORED_BOUND[stored]
        empty = wanted_lse.isinf()
        assert (lse.isinf() == empty).all()
        assert ((lse.double() - wanted_lse)[~empty].abs() <= (5 * SCORE[stored] if stored else 0) + 5e-3).all()
        assert (found[empty] == 0).all()


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips if Triton was imported as a compiler, as one process cannot use both modes."""
    if not dispatch.interpreted():
        pytest.skip("runs with TRITON_INTERPRET=1")


CASES = [
    pytest.param([0, 1, 15, 16, 17, 63, 64, 65], 16, 1, 64, id="ragged"),
    pytest.param([0], 1, 1, 64, id="empty"),
    pytest.param([200, 3], 3, 2, 16, id="small-blocks"),
    pytest.param([70, 1], 5, 8, 0, id="contiguous, speculative, 40 rows"),
]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("lens", "heads", "query", "page"), CASES)
def test_decode_agrees_in_the_interpreter(lens: list[int], heads: int, query: int, page: int) -> None:
    given = inputs(lens, heads, query, page)
    assert dispatch.choose("mla_decode", given["q"].device, torch.float16).name == "triton"
    agrees(given)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("stored", ["int8", "fp8"])
@pytest.mark.parametrize("page", [0, 16, 64])
def test_decode_from_quantised_caches(stored: str, page: int) -> None:
    agrees(inputs([130, 0, 7], 4, 1, page), stored)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("stored", [None, "int8"])
def test_decode_as_it_is_cut_up_before_sm_80(stored: str | None) -> None:
    """With 32 tokens per step in blocks of 64, and 40 rows in three programs of 16."""
    given = inputs([70, 0, 33], 5, 8, 64)
    with mock.patch.object(dispatch, "capability", lambda device: 75):
        assert block_m_of(40, 75) == 16
        agrees(given, stored, decode_config(75, 16, stored))


@pytest.mark.parametrize("stored", [None, "int8", "fp8"])
def test_the_fallback_agrees(stored: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    for dtype in BOUND:
        agrees(inputs([0, 1, 17, 65], 3, 2, 16, dtype), stored)


def test_interpreted_cases_pass_in_a_process_of_their_own() -> None:
    passes_interpreted(__file__, "12 passed", "-k", "interpreter or quantised or cut_up")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("lens", "heads", "query", "page"),
    [
        *CASES,
        pytest.param([4095, 4096, 4097, 0, 33], 16, 1, 64, id="boundaries"),
        pytest.param([131072], 16, 1, 64, id="128k"),
        pytest.param([9000, 10], 128, 1, 16, id="128 heads"),
        pytest.param([5, 2047] * 100, 16, 1, 64, id="200 sequences"),
        pytest.param([1 << 20] * 2, 4, 1, 0, id="beyond 32-bit offsets"),
    ],
)
def test_decode_agrees_on_a_gpu(lens: list[int], heads: int, query: int, page: int, dtype: torch.dtype) -> None:
    given = inputs(lens, heads, query, page, dtype, "cuda")
    assert dispatch.choose("mla_decode", given["q"].device, dtype).name == "triton"
    agrees(given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", ["int8", "fp8"])
@pytest.mark.parametrize(("heads", "query", "page"), [(16, 1, 64), (16, 1, 16), (16, 1, 0), (16, 4, 64)])
def test_decode_from_quantised_caches_on_a_gpu(
    heads: int, query: int, page: int, stored: str, dtype: torch.dtype
) -> None:
    agrees(inputs([4097, 0, 130], heads, query, page, dtype, "cuda"), stored)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("lens", "heads", "query", "page"),
    [
        *CASES[:3],
        pytest.param([70, 1], 2, 8, 0, id="contiguous, speculative"),
        pytest.param([4095, 4096, 4097, 0, 33], 16, 1, 64, id="boundaries"),
        pytest.param([131072], 16, 1, 64, id="many parts"),
        pytest.param([9000] * 5, 16, 1, 64, id="parts of five sequences"),
        pytest.param([5, 2047] * 100, 16, 1, 64, id="200 sequences"),
    ],
)
def test_decode_with_products_of_a_group_of_warps_on_a_gpu(
    lens: list[int], heads: int, query: int, page: int, stored: str, dtype: torch.dtype
) -> None:
    """Also with short caches, for which dispatch selects other configurations."""
    if dispatch.capability(torch.device("cuda")) != 90:
        pytest.skip("requires Hopper's wgmma")
    config = decode_config(90, 16, stored, fast=True)
    assert config.warpgroup
    agrees(inputs(lens, heads, query, page, dtype, "cuda"), stored, config)


@pytest.mark.gpu
@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_every_stored_byte_means_what_it_says(stored: str) -> None:
    """One token whose latent contains every byte: the result is its row for any query."""
    cache = layout.quantise(torch.ones(1, 64, layout.ROW, dtype=torch.float16, device="cuda"), stored)
    values, scales, _ = layout.parts(cache, stored, torch.float16)
    every = torch.arange(512, device="cuda") % 256
    # e4m3 writes NaN as 0x7F and 0xFF.
    every[(every % 128) == 127] = 0 if stored == "fp8" else 127
    values.view(torch.uint8)[0, 0] = every.to(torch.uint8)
    scales[0, 0] = torch.tensor([1.0, 2.0, 0.5, 0.25], device="cuda")
    q = torch.randn(1, 1, 16, layout.ROW, dtype=torch.float16, device="cuda")
    lens = torch.tensor([1], dtype=torch.int32, device="cuda")
    # The token's weight is 2 to the difference of two numbers as large as its score. With scores in the thousands, as
    # with a scale of 1, float32 has too few bits for an exact row.
    out, _ = mla_decode(q, cache, lens, 2.0**-6, None, stored)
    row = layout.dequantise(cache, stored, torch.float16)[0, 0, :512]
    assert torch.equal(out[0, 0], row.to(torch.float16).expand(16, 512))


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [None, "int8"])
def test_few_sequences_of_many_parts_and_many_of_few(stored: str | None) -> None:
    """Both ways to combine parts."""
    for lens in ([40000], [9000] * 5, [4000] * 40):
        agrees(inputs(lens, 16, 1, 64, torch.bfloat16, "cuda"), stored)


@pytest.mark.gpu
def test_one_graph_serves_every_length() -> None:
    given = inputs([70000, 5], 16, 1, 64, torch.bfloat16, "cuda")
    longest = given["lens"].clone()
    mla_decode(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = mla_decode(**given)
    for lens in ([1, 5], [70000, 0], [33333, 4]):
        given["lens"].copy_(torch.tensor(lens, dtype=torch.int32))
        graph.replay()
        assert error(out, expected(given)[0]) <= BOUND[torch.bfloat16]
    assert longest.tolist() == [70000, 5]


def test_dispatch_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    choose = dispatch.choose
    assert choose("mla_decode", cpu, torch.bfloat16).name == "torch"
    assert "not an NVIDIA GPU" in choose("mla_decode", cpu, torch.bfloat16).reason
    assert choose("mla_decode", cpu, torch.bfloat16, cc=90).name == "triton"
    assert choose("mla_decode", cpu, torch.float16, cc=75).name == "triton"
    assert choose("mla_decode", cpu, torch.float16, stored="int8", cc=75).name == "triton"
    assert "no fp8" in choose("mla_decode", cpu, torch.float16, stored="fp8", cc=75).reason
    assert "no bfloat16" in choose("mla_decode", cpu, torch.bfloat16, cc=75).reason
    assert "below 7.5" in choose("mla_decode", cpu, torch.float16, cc=70).reason
    assert choose("mla_prefill", cpu, torch.float16, cc=75).name == "triton"
    assert "no bfloat16" in choose("mla_attention", cpu, torch.bfloat16, cc=75).reason
    assert choose("mla_rope_cache", cpu, torch.float16, cc=75).name == "triton"
    assert "no bfloat16" in choose("mla_rope_cache", cpu, torch.bfloat16, cc=75).reason
    assert "no fp8" in choose("mla_decode", cpu, torch.bfloat16, stored="fp8", cc=80).reason
    assert "neither" in choose("mla_decode", cpu, torch.float32, cc=90).reason
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert choose("mla_decode", cpu, torch.bfloat16, cc=90).name == "torch"
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(UserError, match="cannot use Triton here"):
        choose("mla_decode", cpu, torch.bfloat16)
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(UserError, match="expected auto, triton, torch, flash4 or cudnn"):
        choose("mla_decode", cpu, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 9, 2, 576, dtype=torch.float16)}, "q is"),
        ({"cache": torch.zeros(1, 64, 512, dtype=torch.float16)}, "cache is"),
        ({"lens": torch.tensor([5])}, "lens is"),
        ({"table": torch.zeros(1, 4)}, "table is"),
        ({"cache": torch.zeros(5, 48, 576, dtype=torch.float16)}, "power of 2"),
        ({"cache": torch.zeros(0, 64, 576, dtype=torch.float16), "table": None}, "pass a table"),
        ({"cache": torch.zeros(1, 64, 600, dtype=torch.float16)[..., :576]}, "not contiguous"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mla_decode(**(inputs([5], 2, 1, 64) | change))
