"""FlashAttention 4 is used where it is installed, agrees with float64, and works with compile and recompute."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_attention import RAGGED, SCALE, agrees, bounds_of, expected, inputs
from torch import Tensor

from ictx.errors import UserError
from ictx.kernels import dispatch
from ictx.kernels.attention import flash4
from ictx.kernels.attention.op import choice, mla_attention
from ictx.kernels.attention.packing import Packing
from ictx.parallel.recompute import KEPT

CPU = torch.device("cpu")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates that the supported version is installed, on a supported GPU."""
    monkeypatch.setattr(dispatch, "flash4_version", lambda: dispatch.FLASH4)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(
    ("cc", "dtype", "forced", "name", "reason"),
    [
        (90, torch.bfloat16, "auto", "flash4", "fastest here: forward and backward of 32,768 tokens"),
        (100, torch.float16, "auto", "flash4", "it is made for this architecture"),
        (100, torch.float16, "flash4", "flash4", "ICTX_KERNELS=flash4"),
        (80, torch.bfloat16, "auto", "triton", "the kernel supports this GPU"),
        (80, torch.bfloat16, "flash4", "triton", "FlashAttention 4 is not used: compute capability 8.0 is neither 9"),
        (90, torch.float32, "auto", "torch", "FlashAttention 4 is not used: it has no float32"),
        (90, torch.bfloat16, "triton", "triton", "ICTX_KERNELS=triton"),
        (90, torch.bfloat16, "torch", "torch", "ICTX_KERNELS=torch"),
    ],
)
def test_the_choice_and_why(
    cc: int, dtype: torch.dtype, forced: str, name: str, reason: str, equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, forced)
    choice = dispatch.choose("mla_attention", CPU, dtype, cc=cc, equal=equal)
    assert choice.name == name and reason in choice.reason
    assert dispatch.choose("mla_prefill", CPU, dtype, cc=cc).name in ("triton", "torch")


@pytest.mark.usefixtures("installed")
def test_where_bits_must_repeat_it_does_not_attend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    choice = dispatch.choose("mla_attention", CPU, torch.bfloat16, cc=90)
    assert choice.name == "triton" and "is not used: its gradients are not deterministic" in choice.reason


@pytest.mark.parametrize("version", [None, "4.0.0b1"])
def test_without_the_version_that_is_called_the_next_one_attends(
    version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "flash4_version", lambda: version)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    for equal, name in ((True, "cudnn"), (False, "triton")):
        choice = dispatch.choose("mla_attention", CPU, torch.bfloat16, cc=90, equal=equal)
        assert choice.name == name and f"flash-attn-4 {dispatch.FLASH4} is not installed" in choice.reason
    monkeypatch.setenv(dispatch.VARIABLE, "flash3")
    with pytest.raises(UserError, match="expected auto, triton, torch, flash4 or cudnn"):
        dispatch.choose("mla_attention", CPU, torch.bfloat16, cc=90)


def test_what_is_called_is_what_is_locked() -> None:
    folder = Path(__file__).parents[1]
    for file in ("pyproject.toml", "requirements/cuda-flash4.in"):
        assert f"flash-attn-4[cu13]=={dispatch.FLASH4}" in (folder / file).read_text()
    assert f"\nflash-attn-4=={dispatch.FLASH4} " in (folder / "requirements/cuda-flash4.txt").read_text()


def attended(q: Tensor, k: Tensor, v: Tensor, edges: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns causal attention of one row [tokens, heads, width], and log-sum-exp [heads, tokens]."""
    bounds = [0, len(q)] if edges is None else edges.tolist()
    dtype, out, lse = q.dtype, [], []
    q, k, v = q.double(), k.double(), v.double()
    for first, end in pairwise(bounds):
        score = torch.einsum("qhd,khd->hqk", q[first:end], k[first:end]) * SCALE
        score = score.masked_fill(torch.ones(end - first, end - first).triu(1).bool(), -torch.inf)
        out.append(torch.einsum("hqk,khv->qhv", score.softmax(-1), v[first:end]))
        lse.append(score.logsumexp(-1).float())
    return torch.cat(out).to(dtype), torch.cat(lse, 1)


def gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, lse: Tensor, edges: Tensor | None
) -> list[Tensor]:
    """Returns the gradients of `attended` from their formulas, since autograd is off inside of an operator."""
    results = [torch.empty_like(x) for x in (q, k, v)]
    q, k, v, out, grad, lse = (x.double() for x in (q, k, v, out, grad, lse))
    for first, end in pairwise([0, len(q)] if edges is None else edges.tolist()):
        row = slice(first, end)
        score = torch.einsum("qhd,khd->hqk", q[row], k[row]) * SCALE
        weight = (score - lse[:, row, None]).exp().tril()
        inner = torch.einsum("qhv,khv->hqk", grad[row], v[row]) - (grad[row] * out[row]).sum(-1).T[..., None]
        change = weight * inner * SCALE
        for result, form, x in zip(results, ("hqk,khd->qhd", "hqk,qhd->khd"), (k, q), strict=False):
            result[row] = torch.einsum(form, change, x[row])
        results[2][row] = torch.einsum("hqk,qhv->khv", weight, grad[row])
    return results


@pytest.fixture
def library(installed: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the library's two functions with PyTorch; returns the list of calls."""
    calls: list[str] = []

    def rows(*given: Tensor, edges: Tensor | None) -> tuple[Tensor, Tensor]:
        if edges is not None:
            return attended(*given, edges)
        out, lse = zip(*(attended(*row, None) for row in zip(*given, strict=True)), strict=True)
        return torch.stack(out), torch.stack(lse)

    def forward(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Any, cu_seqlens_k: Any, **given: Any) -> Any:
        assert given == {"softmax_scale": SCALE, "causal": True, "return_lse": True} and cu_seqlens_q is cu_seqlens_k
        calls.append("packed" if cu_seqlens_q is not None else f"{len(q)} rows")
        return *rows(q, k, v, edges=cu_seqlens_q), None, None, None

    def backward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *, cu_seqlens_q: Any, **given: Any
    ) -> Any:
        assert given.pop("cu_seqlens_k") is cu_seqlens_q and given == {"softmax_scale": SCALE, "causal": True}
        calls.append("backward")
        if cu_seqlens_q is not None:
            return gradients(q, k, v, out, dout, lse, cu_seqlens_q)
        found = [gradients(*row, None) for row in zip(q, k, v, out, dout, lse, strict=True)]
        return [torch.stack(parts) for parts in zip(*found, strict=True)]

    interface = SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", interface)  # type: ignore[arg-type]
    monkeypatch.setattr(dispatch, "capability", lambda device: 90)
    return calls


def test_documents_go_to_the_library_with_their_edges(library: list[str]) -> None:
    agrees(inputs(sum(RAGGED), 2, 192, 128, torch.bfloat16), RAGGED)
    agrees(inputs(17, 1, 192, 128, torch.bfloat16), [17])
    # Each as one operator, and as two calls.
    assert library == ["packed", "backward"] * 2 + ["1 rows", "backward"] * 2
    q, k, v, grad = inputs(12, 2, 192, 128, torch.bfloat16)
    out = mla_attention(q, k, v, SCALE, Packing.of_rows(3, 4, CPU))
    found = [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]
    for ours, wanted in zip(found, expected(q, k, v, grad, [4, 4, 4]), strict=True):
        assert float((ours.double() - wanted).norm() / wanted.norm()) <= 8e-3
    assert library[8:] == ["3 rows", "backward"]
    # Without edges of the documents.
    assert choice("mla_attention", q, 128).name == "triton"
    assert choice("mla_attention", q, 128, edges=True).name == "flash4"
    assert choice("mla_attention", q[..., :128], 128, 1).name == "cudnn"


def test_edges_are_known_where_it_may_attend(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = torch.tensor([False, False, True, False, False, True])
    assert Packing.of_starts(starts).edges is None, "edges are computed for this library only"
    monkeypatch.setattr(dispatch, "takes_edges", lambda device: True)
    edges = Packing.of_starts(starts).edges
    assert edges is not None and edges.tolist() == [0, 2, 5, 6] and edges.dtype == torch.int32


@pytest.mark.parametrize("packed", [True, False])
def test_it_is_an_operation_of_pytorch(packed: bool, library: list[str]) -> None:
    """It has shapes for fake tensors and a formula for autograd, and selective recompute keeps its result."""
    q, k, v, _ = inputs(12, 2, 192, 128, torch.float32)
    edges = bounds_of([5, 7]) if packed else None
    if not packed:
        q, k, v = (x.detach().unflatten(0, (3, 4)).requires_grad_() for x in (q, k, v))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(flash4.OPERATION, (q, k, v, SCALE, edges), test_utils=checks)
    assert flash4.OPERATION in KEPT and "backward" in library


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lens", [[4096], [1], RAGGED, [63, 64, 65, 1000, 127, 128, 129, 700], [2] * 1000])
def test_it_agrees_on_a_gpu(lens: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "flash4")
    if dispatch.choose("mla_attention", torch.device("cuda"), dtype).name != "flash4":
        pytest.skip("FlashAttention 4 is not installed, or does not support this GPU")
    agrees(inputs(sum(lens), 3, 192, 128, dtype, "cuda"), lens)


@pytest.mark.gpu
def test_a_compiled_function_calls_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "flash4")
    if dispatch.choose("mla_attention", torch.device("cuda"), torch.bfloat16).name != "flash4":
        pytest.skip("FlashAttention 4 is not installed, or does not support this GPU")
    compiled = torch.compile(mla_attention, fullgraph=True)
    for lens in ([100, 28], [5, 60, 63], [7] * 9):
        q, k, v, grad = inputs(sum(lens), 2, 192, 128, torch.bfloat16, "cuda")
        packing = Packing.of(bounds_of(lens, "cuda"), sum(lens))
        results = []
        for function in (mla_attention, compiled):
            out = function(q, k, v, SCALE, packing)
            results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), grad)])
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)
