"""Kernels compiled for Turing, without such a GPU: the CPU interprets their PTX (see `ptx`).

The same kernels for sm_80 and sm_90 check the interpreter: the decodes for sm_90 were also run on such a GPU.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ptx
import pytest
import test_attention
import test_decode_step
import test_kernels
import test_kernels_rope_cache
import test_prefill
import torch
from models import small

from ictx.kernels import dispatch, turing
from ictx.kernels.build.offline import compiling
from ictx.kernels.decode import op as decode
from ictx.kernels.decode.tuning import decode_config
from ictx.serve.ragged import attend_ragged

PROGRAMS = 3
MATRIX = {75: "m16n8k8", 80: "m16n8k16", 90: "m16n8k16"}
"""Shape of a matrix instruction's operands, by target."""
launched: list[tuple[str, str]] = []
"""Kernels launched by a test, and their PTX."""


@pytest.fixture
def target(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Simulates the compute capability of every device; launches run on the CPU.

    The parameter may also set whether the threads of a program execute each instruction together.
    """
    capability, together = request.param if isinstance(request.param, tuple) else (request.param, True)
    if dispatch.interpreted():
        pytest.skip("nothing is compiled in Triton's interpreter")
    from triton.runtime.jit import JITFunction

    compiled_by = JITFunction.run

    def run(self: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = compiled_by(self, *given, grid=grid, warmup=True, **options)
        named = {name: value for name, value in options.items() if name in self.arg_names}
        bound = inspect.signature(self.fn).bind(*given, **named).arguments
        arguments = [value for name, value in bound.items() if compiled.src.signature[name] != "constexpr"]
        launched.append((self.__name__, compiled.asm["ptx"]))
        # Two more arguments for the compiler's scratch memory, which our kernels do not need.
        ptx.run(compiled.asm["ptx"], grid, compiled.metadata.shared, [*arguments, 0, 0], together=together)
        return compiled

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(decode, "multiprocessors", lambda device: PROGRAMS)
    monkeypatch.setattr(decode, "_workspaces", {})
    launched.clear()
    with compiling(tmp_path, capability):
        yield capability


def have_run(target: int, *names: str) -> bool:
    """Returns whether exactly these kernels were launched, with the target's matrix instructions."""
    shapes = {shape for _, text in launched for shape in re.findall(r"\bmma\.sync\.aligned\.(\w+)\.", text)}
    return {name for name, _ in launched} == set(names) and shapes == {MATRIX[target]}


@pytest.mark.parametrize("target", [75, 90], indirect=True)
@pytest.mark.parametrize("stored", [None, "int8"])
@pytest.mark.parametrize(
    ("lens", "heads", "query", "page"),
    [
        pytest.param([0, 1, 33, 200], 16, 1, 64, id="ragged"),
        pytest.param([70, 1], 5, 8, 0, id="contiguous, speculative, 40 rows", marks=pytest.mark.full),
        pytest.param([150, 3], 3, 2, 16, id="small-blocks"),
    ],
)
def test_decode_agrees(target: int, lens: list[int], heads: int, query: int, page: int, stored: str | None) -> None:
    test_kernels.agrees(test_kernels.inputs(lens, heads, query, page), stored)
    assert have_run(target, "decode")


@pytest.mark.parametrize(
    ("target", "stored", "lens", "heads", "query", "page"),
    [
        pytest.param(90, "int8", [0, 1, 65, 200], 16, 1, 64, id="ragged, int8"),
        pytest.param(90, "fp8", [0, 65, 200], 16, 1, 64, id="ragged, fp8"),
        pytest.param(90, "int8", [150, 3], 3, 2, 16, id="small blocks"),
        pytest.param((90, False), "int8", [70], 16, 1, 64, id="warp after warp"),
    ],
    indirect=["target"],
)
def test_products_of_a_group_of_warps_agree(
    target: int, stored: str, lens: list[int], heads: int, query: int, page: int
) -> None:
    """wgmma, which Hopper GPUs use for quantised caches."""
    config = decode_config(target, 16, stored, fast=True)
    assert config.warpgroup
    test_kernels.agrees(test_kernels.inputs(lens, heads, query, page), stored, config)
    assert {name for name, _ in launched} == {"decode"}
    shapes = {shape for _, text in launched for shape in re.findall(r"\bmma_async\.sync\.aligned\.(\w+)\.", text)}
    assert shapes == {"m64n16k16"}


@pytest.mark.parametrize("target", [(90, False)], indirect=True)
def test_what_these_products_wait_for_is_missed(target: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler inserts barriers and fences that are not in the source; the test removes them from the PTX."""
    given, config, run = test_kernels.inputs([140], 16, 1, 64), decode_config(target, 16, "int8", fast=True), ptx.run
    for instruction, message in (
        ("fence.proxy.async", "is written without fence.proxy.async before its product"),
        ("wgmma.fence", "is written without wgmma.fence before its product"),
        ("wgmma.wait_group", "before its product is waited for"),
        ("bar.sync", ""),
    ):

        def without(text: str, *given: Any, line: str = rf"\n\s*{re.escape(instruction)}.*", **options: Any) -> None:
            less = re.sub(line, "", text)
            assert less != text
            run(less, *given, **options)

        monkeypatch.setattr(ptx, "run", without)
        with pytest.raises(AssertionError, match=message or None):
            test_kernels.agrees(given, "int8", config)


@pytest.mark.parametrize("target", [75, 80], indirect=True)
@pytest.mark.parametrize(
    ("lens", "columns"),
    [
        pytest.param([100], (192, 128), id="one document"),
        pytest.param([0, 1, 15, 70, 33], (192, 128), id="ragged"),
        pytest.param([31, 3], (40, 24), id="padded columns"),
    ],
)
def test_attention_agrees(target: int, lens: list[int], columns: tuple[int, int]) -> None:
    test_attention.agrees(test_attention.inputs(sum(lens), 2, *columns), lens)
    assert have_run(target, "forward", "row_sums", "keys_values", "queries")


@pytest.mark.parametrize("target", [75], indirect=True)
@pytest.mark.parametrize(("sizes", "knobs"), test_prefill.CASES)
def test_prefill_agrees(target: int, sizes: tuple[int, ...], knobs: dict[str, Any]) -> None:
    test_prefill.agrees(test_prefill.inputs(*sizes), **knobs)
    assert have_run(target, "decode" if knobs["mode"] == "absorbed" else "forward")


@pytest.mark.parametrize("target", [(75, False)], indirect=True)
@pytest.mark.parametrize("stored", [None, "int8"])
def test_no_barrier_of_the_decode_is_missing(target: int, stored: str | None) -> None:
    test_kernels.agrees(test_kernels.inputs([70], 16, 1, 64), stored)
    assert have_run(target, "decode")


@pytest.mark.parametrize("target", [(75, False)], indirect=True)
def test_no_barrier_of_the_attention_is_missing(target: int) -> None:
    test_attention.agrees(test_attention.inputs(40, 1, 192, 128), [40])
    assert have_run(target, "forward", "row_sums", "keys_values", "queries")


@pytest.mark.parametrize("target", [75], indirect=True)
@pytest.mark.parametrize("causal", [True, False])
def test_sequences_side_by_side(target: int, causal: bool) -> None:
    starts = [0, 0, 1, 40, 83]
    ends = starts if causal else [0, 5, 75, 80, 200]
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(tokens, 2, width, dtype=torch.float16, generator=generator)
        for tokens, width in ((starts[-1], 192), (ends[-1], 192), (ends[-1], 128))
    )
    out, lse = attend_ragged(q, k, v, starts, ends, 0.07, causal=causal)
    wanted, wanted_lse = attend_ragged(q.double(), k.double(), v.double(), starts, ends, 0.07, causal=causal)
    assert test_kernels.error(out, wanted) <= test_kernels.BOUND[torch.float16]
    assert (lse - wanted_lse).abs().max() <= 5e-3
    assert have_run(target, "forward")


@pytest.mark.parametrize("target", [75], indirect=True)
@pytest.mark.parametrize("stored", [None, "int8"])
def test_new_tokens_reach_the_cache(target: int, stored: str | None) -> None:
    test_kernels_rope_cache.writes(torch.float16, stored)
    assert {name for name, _ in launched} == {"rope_cache"}


@pytest.mark.parametrize("target", [75], indirect=True)
@pytest.mark.parametrize("stored", [None, "int8"])
def test_a_model_decodes(target: int, stored: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_decode_step, "TOKENS", 2)
    test_decode_step.agrees(small().half(), 1, 64, stored)
    step = {"begin", "project", "absorb", "rope_cache", "decode", "best_of_part", "best_of_all"}
    assert have_run(target, "forward", *step)


@pytest.mark.parametrize("target", [75], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "stages", "message"),
    [(torch.bfloat16, 1, "products of float16, not bf16"), (torch.float16, 2, "launch with one stage")],
)
def test_what_turing_cannot_do_is_not_compiled(target: int, dtype: torch.dtype, stages: int, message: str) -> None:
    given = test_kernels.inputs([5], 16, 1, 64, dtype)
    config = replace(decode_config(target, 16, None), stages=stages)
    with pytest.raises(ValueError, match=message):
        decode._launch(*given.values(), None, None, None, config)
    assert not launched


def test_only_our_launches_are_compiled_so() -> None:
    from triton import knobs

    for cc, hook in ((75, turing.pipeline), (80, None)):
        with turing.tensor_cores(cc):
            assert knobs.runtime.add_stages_inspection_hook is hook
        assert knobs.runtime.add_stages_inspection_hook is None
