"""`mla_attention` and its gradient agree with float64, in Triton's interpreter and on a GPU if available."""

from __future__ import annotations

import pytest
import torch
from interpreter import passes_interpreted
from torch import Tensor

from ictx.errors import UserError
from ictx.kernels import dispatch
from ictx.kernels.attention import pair
from ictx.kernels.attention.launches import widths
from ictx.kernels.attention.op import choice, mla_attention
from ictx.kernels.attention.operation import operation
from ictx.kernels.attention.packing import Packing
from ictx.kernels.attention.tuning import AttentionConfig, Tiles, attention_config

BOUND = {torch.float16: 2e-3, torch.bfloat16: 8e-3}
SCALE = 0.07
RAGGED = [0, 1, 15, 16, 17, 0, 33]


def inputs(
    tokens: int, heads: int, width: int, value: int, dtype: torch.dtype = torch.float16, device: str = "cpu"
) -> list[Tensor]:
    """Returns random q, k, v and gradient of the output."""
    generator = torch.Generator(device).manual_seed(tokens)
    made = [
        torch.randn(tokens, heads, columns, dtype=dtype, device=device, generator=generator)
        for columns in (width, width, value, value)
    ]
    return [*(x.requires_grad_() for x in made[:3]), made[3]]


def bounds_of(lens: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lens], device=device).cumsum(0).int()


def expected(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lens: list[int]) -> list[Tensor]:
    """Returns output and gradients in float64 from the definition: all scores, a mask, a softmax."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    document = torch.arange(len(lens), device=q.device).repeat_interleave(torch.tensor(lens, device=q.device))
    hidden = (document[:, None] != document[None, :]) | torch.ones_like(document[:, None] * document).triu(1).bool()
    score = torch.einsum("qhd,khd->hqk", q, k) * SCALE
    out = torch.einsum("hqk,khv->qhv", score.masked_fill(hidden, -torch.inf).softmax(-1), v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.double())]


def agrees(given: list[Tensor], lens: list[int], config: AttentionConfig | None = None) -> None:
    """Compares forward and backward with float64."""
    q, k, v, grad = given
    out = mla_attention(q, k, v, SCALE, None if len(lens) == 1 else bounds_of(lens, q.device.type), config=config)
    close([out.detach(), *torch.autograd.grad(out, (q, k, v), grad)], given, lens)
    if config is None:
        bounds = bounds_of(lens, q.device.type)
        packing = Packing.of_rows(1, lens[0], q.device) if len(lens) == 1 else Packing.of(bounds, len(q))
        close(in_two_calls(given, packing), given, lens)


def close(found: list[Tensor], given: list[Tensor], lens: list[int]) -> None:
    """Compares results with float64."""
    dtype = given[0].dtype
    for ours, wanted in zip(found, expected(*given, lens), strict=True):
        assert ours.shape == wanted.shape and ours.dtype == dtype
        assert torch.isfinite(ours).all()
        assert float((ours.double() - wanted).norm() / (wanted.norm() or 1.0)) <= BOUND[dtype]


def in_two_calls(given: list[Tensor], packing: Packing) -> list[Tensor]:
    """Returns output and gradients by `pair`; keys and values are views of one projection, as with several ranks."""
    q, k, v, grad = (x.detach() for x in given)
    v = torch.cat([k, v], -1)[..., k.shape[-1] :]
    out, lse = pair.forward(q, k, v, SCALE, packing)
    assert lse.shape == (q.shape[1], len(q))
    return [out, *pair.backward(grad, q, k, v, out, lse, SCALE, packing)]


@pytest.fixture
def interpreter() -> None:
    """Skips if Triton was imported as a compiler, as one process cannot use both modes."""
    if not dispatch.interpreted():
        pytest.skip("runs with TRITON_INTERPRET=1")


def tiles(block_m: int, block_n: int, tma: bool = False, ahead: bool = False) -> AttentionConfig:
    one = Tiles(block_m, block_n, 4, 1, tma, ahead)
    return AttentionConfig(one, one, one)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("lens", "heads", "columns", "config"),
    [
        pytest.param(RAGGED, 2, (192, 128), None, id="ragged"),
        pytest.param([65], 1, (192, 128), tiles(16, 32), id="one document, narrow queries"),
        pytest.param([20, 44], 1, (192, 128), tiles(32, 16), id="narrow keys"),
        pytest.param(RAGGED, 2, (192, 128), tiles(32, 32, tma=True), id="tensor descriptors"),
        pytest.param([20, 44, 1], 1, (192, 128), tiles(32, 16, ahead=True), id="scores ahead"),
        pytest.param([31, 3], 2, (40, 24), None, id="padded columns"),
        pytest.param([17], 1, (128, 64), None, id="a power of 2"),
        pytest.param([1], 1, (192, 128), None, id="one token"),
    ],
)
def test_attention_agrees_in_the_interpreter(
    lens: list[int], heads: int, columns: tuple[int, int], config: AttentionConfig | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Uninitialised memory contains NaN.
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
    agrees(inputs(sum(lens), heads, *columns), lens, config)


@pytest.mark.usefixtures("interpreter")
def test_the_gradient_is_the_slope_in_the_interpreter() -> None:
    # As gradcheck, but only along the gradient: float16's rounding exceeds the slope in other directions.
    q, k, v, grad = inputs(40, 1, 64, 32)
    steps = [gradient.double() for gradient in _gradients(q, k, v, grad)]
    slope = sum(float((step * step).sum()) for step in steps)
    size = 0.5 / max(float(step.abs().max()) for step in steps)
    ahead, behind = (
        float(mla_attention(*((x + sign * size * step).half() for x, step in zip((q, k, v), steps, strict=True)), SCALE)
        .double().mul(grad.double()).sum()) for sign in (1, -1)
    )  # fmt: skip
    assert (ahead - behind) / (2 * size) == pytest.approx(slope, rel=0.02)


def _gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(mla_attention(q, k, v, SCALE), (q, k, v), grad)


@pytest.mark.usefixtures("interpreter")
def test_the_operation_is_one_for_pytorch_in_the_interpreter() -> None:
    """Its registration is correct for torch.compile and selective recompute; compiled code gives the same bits."""
    q, k, v, _ = inputs(33, 2, 192, 128)
    packing = Packing.of(bounds_of([20, 13]), 33)
    numbers = attention_config(0).numbers()
    assert AttentionConfig.of_numbers(numbers) == attention_config(0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operation, (q, k, v, SCALE, packing.first, packing.end, numbers), test_utils=tests)
    compiled = torch.compile(mla_attention, backend="aot_eager", fullgraph=True)
    for attend in (mla_attention, compiled):
        out = attend(q, k, v, SCALE, packing)
        found = [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))]
        if attend is mla_attention:
            wanted = found
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("interpreter")
def test_views_and_large_values_in_the_interpreter() -> None:
    # Keys and values as in the model, two views of one projection; scores far beyond the range of exp.
    whole = torch.randn(20, 2, 96, generator=torch.Generator().manual_seed(0)).half()
    whole[..., :64] *= 60
    q, k, v = whole.split(32, -1)
    out = mla_attention(q, k, v, SCALE)
    assert torch.isfinite(out).all()
    score = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * SCALE
    mask = torch.ones(20, 20).triu(1).bool()
    wanted = torch.einsum("hqk,khv->qhv", score.masked_fill(mask, -torch.inf).softmax(-1), v.double())
    assert float((out.double() - wanted).norm() / wanted.norm()) <= 2e-3


def test_interpreted_cases_pass_in_a_process_of_their_own() -> None:
    passes_interpreted(__file__, "11 passed", "-k", "interpreter")


@pytest.mark.parametrize("dtype", [*BOUND, torch.float64])
def test_the_fallback_agrees(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    monkeypatch.setitem(BOUND, torch.float64, 1e-12)
    agrees(inputs(sum(RAGGED), 2, 192, 128, dtype), RAGGED)
    agrees(inputs(17, 1, 24, 40, dtype), [17])


def test_gradcheck_of_the_fallback() -> None:
    given = [x.detach().double().requires_grad_() for x in inputs(7, 2, 6, 4)[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: mla_attention(q, k, v, SCALE, bounds_of([3, 4])), given)


def test_no_tokens() -> None:
    q, k, v, _ = inputs(0, 2, 192, 128)
    assert mla_attention(q, k, v, SCALE, bounds_of([0])).shape == (0, 2, 128)


def test_packing_knows_each_tokens_document() -> None:
    packing = Packing.of(bounds_of([2, 0, 3]), 6)
    assert packing.first.tolist() == [0, 0, 2, 2, 2, 5]
    assert packing.end.tolist() == [2, 2, 5, 5, 5, 6]
    assert packing.bounds() == [0, 2, 5]
    again = Packing.of_starts(torch.tensor([False, False, True, False, False, True]))
    assert torch.equal(again.first, packing.first) and torch.equal(again.end, packing.end)


def test_rows_are_documents_of_equal_length() -> None:
    packing = Packing.of_rows(2, 3, torch.device("cpu"))
    assert (packing.first.tolist(), packing.end.tolist(), packing.equal) == ([0] * 3 + [3] * 3, [3] * 3 + [6] * 3, 2)
    assert Packing.of(bounds_of([3, 3]), 6).equal == 0, "lengths were not compared"


@pytest.mark.parametrize(
    ("cc", "equal", "dtype", "forced", "name"),
    [
        (90, True, torch.bfloat16, "auto", "cudnn"),
        (90, False, torch.bfloat16, "auto", "triton"),
        (90, True, torch.bfloat16, "triton", "triton"),
        (90, True, torch.bfloat16, "torch", "torch"),
        (90, True, torch.float32, "auto", "torch"),
        (80, True, torch.bfloat16, "auto", "triton"),
        (80, True, torch.bfloat16, "cudnn", "triton"),
        (100, True, torch.bfloat16, "auto", "triton"),
        (100, True, torch.bfloat16, "cudnn", "cudnn"),
    ],
)
def test_cudnn_attends_where_it_was_measured_to_be_faster(
    cc: int, equal: bool, dtype: torch.dtype, forced: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, forced)
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    cpu = torch.device("cpu")
    assert dispatch.choose("mla_attention", cpu, dtype, cc=cc, equal=equal).name == name
    assert dispatch.choose("mla_prefill", cpu, dtype, cc=cc, equal=equal).name in ("triton", "torch")


def test_where_bits_must_repeat_no_library_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    chosen = dispatch.choose("mla_attention", torch.device("cpu"), torch.bfloat16, cc=90, equal=True)
    assert chosen.name == "triton"


def test_widths_are_powers_of_two() -> None:
    assert [widths(n) for n in (192, 128, 96, 40, 24, 130, 250)] == [
        (128, 64), (128, 0), (64, 32), (32, 16), (32, 0), (128, 16), (256, 0),
    ]  # fmt: skip


def test_the_shape_takes_part_in_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    q, k, v, _ = inputs(4, 1, 256, 128)
    with pytest.raises(UserError, match="256 and 128 columns are wider"):
        mla_attention(q, k, v, SCALE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 192)}, "q is"),
        ({"k": torch.zeros(4, 1, 64)}, "k is"),
        ({"v": torch.zeros(5, 1, 128)}, "v is"),
        ({"scale": 0.0}, "scale is"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens is"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, object], message: str) -> None:
    right = {"q": torch.zeros(4, 1, 192), "k": torch.zeros(4, 1, 192), "v": torch.zeros(4, 1, 128), "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        mla_attention(**(right | change))  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "lens", [[4095], [4096], [4097], [1], RAGGED, [63, 64, 65, 1000, 127, 128, 129, 700], [2] * 1000]
)
def test_attention_agrees_on_a_gpu(lens: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    agrees(inputs(sum(lens), 3, 192, 128, dtype, "cuda"), lens)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "length"), [(1, 4096), (3, 1000), (2, 65)])
def test_cudnn_agrees_on_a_gpu(rows: int, length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "cudnn")
    given = inputs(rows * length, 3, 192, 128, dtype, "cuda")
    packing = Packing.of_rows(rows, length, given[0].device)
    if choice("mla_attention", given[0], 128, packing.equal).name != "cudnn":
        pytest.skip("cuDNN has no such attention for this GPU")
    out = mla_attention(*given[:3], SCALE, packing)
    for found in ([out.detach(), *torch.autograd.grad(out, given[:3], given[3])], in_two_calls(given, packing)):
        close(found, given, [length] * rows)


@pytest.mark.gpu
def test_the_gradient_has_the_same_bits_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    given = inputs(3000, 4, 192, 128, torch.bfloat16, "cuda")
    first, second = (_gradients(*given) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
