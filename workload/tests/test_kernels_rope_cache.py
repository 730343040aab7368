"""New tokens are written to the cache as by the model, in Triton's interpreter, in PyTorch, and on a GPU."""

from __future__ import annotations

import pytest
import torch
from interpreter import passes_interpreted
from torch import Tensor, nn

from ictx.kernels import dispatch, layout
from ictx.kernels.rope_cache.op import mla_rope_cache
from ictx.model.rope import Rotations, rotate

EPS = 1e-6
SLOTS = [5, 0, -1, 17, 63, 64, 100]
BLOCKS, SIZE = 7, 16


def inputs(dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(len(SLOTS), layout.ROW, dtype=torch.float32, device=device, generator=generator)
    # A group of zeros has no scale; one token is much larger than the others.
    x[0, :128] = 0
    x[1] *= 300
    angles = torch.rand(len(SLOTS), 32, device=device, generator=generator) * 1e4
    return {
        "x": x.to(dtype),
        "weight": torch.rand(512, device=device, generator=generator).to(dtype) + 0.5,
        "cos": angles.cos() * 1.1,
        "sin": angles.sin() * 1.1,
        "slots": torch.tensor(SLOTS, device=device),
    }


def wanted(given: dict[str, Tensor]) -> Tensor:
    """Returns the rows in float64 from the model's modules."""
    norm = nn.RMSNorm(512, eps=EPS, dtype=torch.float64, device=given["x"].device)
    norm.weight.data.copy_(given["weight"])
    x = given["x"].double()
    rope = Rotations(given["cos"][None, :, None].double(), given["sin"][None, :, None].double())
    # `rotate` computes in float32.
    key = rotate(x[None, :, None, 512:].float(), rope)[0, :, 0]
    return torch.cat([norm(x[:, :512]), key.double()], -1).detach()


def writes(dtype: torch.dtype, stored: str | None, device: str = "cpu") -> None:
    """Writes into a cache filled with a pattern and checks every row; a second write must give the same bytes."""
    given, results = inputs(dtype, device), []
    for _ in range(2):
        row = layout.ROW_BYTES if stored else layout.ROW
        # Blocks that are not contiguous, as in a cache of several layers.
        whole = torch.full((BLOCKS, 2, SIZE, row), 7, dtype=torch.uint8 if stored else dtype, device=device)
        cache = whole[:, 1]
        mla_rope_cache(**given, cache=cache, eps=EPS, stored=stored)
        assert (whole[:, 0] == 7).all()
        results.append(cache.clone())
    assert torch.equal(results[0], results[1])
    untouched = torch.full((BLOCKS, SIZE, row), 7, dtype=cache.dtype, device=device)
    if stored:
        found = layout.dequantise(cache, stored, dtype)
        untouched = layout.dequantise(untouched, stored, dtype)
    else:
        found = cache
    found, untouched = found.double().flatten(0, 1), untouched.double().flatten(0, 1)
    kept = given["slots"] >= 0
    rows = wanted(given)[kept]
    at = given["slots"][kept]
    # Half a unit in the last place of the stored value: of the 16-bit dtype; of a group's maximum in int8's 127 steps;
    # of the value in e4m3 (3 bits of mantissa), which is subnormal below 2^-6 of 448.
    half = torch.finfo(dtype).eps / 2
    error = (found[at] - rows).abs()
    assert (error[:, 512:] <= rows[:, 512:].abs() * half * 1.01 + 1e-6).all()
    largest = rows[:, :512].unflatten(-1, (4, 128)).abs().amax(-1, keepdim=True).expand(-1, -1, 128).flatten(1)
    if stored == "int8":
        bound = largest / 127 / 2
    elif stored == "fp8":
        bound = torch.maximum(rows[:, :512].abs() * 2**-4, largest / 448 * 2**-10)
    else:
        bound = rows[:, :512].abs() * half
    assert (error[:, :512] <= bound * 1.001 + 1e-6).all()
    others = torch.ones(BLOCKS * SIZE, dtype=torch.bool, device=device)
    others[at] = False
    assert torch.equal(found[others], untouched[others])


@pytest.mark.parametrize("stored", [None, "int8", "fp8"])
def test_rope_cache_in_the_interpreter(stored: str | None) -> None:
    if not dispatch.interpreted():
        pytest.skip("runs with TRITON_INTERPRET=1")
    assert dispatch.choose("mla_rope_cache", torch.device("cpu"), torch.float16, stored=stored).name == "triton"
    writes(torch.float16, stored)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [None, "int8", "fp8"])
def test_rope_cache_in_pytorch(stored: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    writes(dtype, stored)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [None, "int8", "fp8"])
def test_rope_cache_on_a_gpu(stored: str | None, dtype: torch.dtype) -> None:
    assert dispatch.choose("mla_rope_cache", torch.device("cuda"), dtype, stored=stored).name == "triton"
    writes(dtype, stored, "cuda")


def test_interpreted_cases_pass_in_a_process_of_their_own() -> None:
    passes_interpreted(__file__, "3 passed", "-k", "in_the_interpreter")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(7, 512), "x is"),
        ("weight", torch.zeros(64), "weight is"),
        ("cos", torch.zeros(7, 32, dtype=torch.float64), "cos is"),
        ("slots", torch.zeros(7, dtype=torch.int32), "slots is"),
        ("cache", torch.zeros(7, 16, 600, dtype=torch.float16)[..., :576], "not contiguous"),
    ],
)
def test_wrong_inputs_are_refused(name: str, value: Tensor, message: str) -> None:
    given = inputs(torch.float16) | {"cache": torch.zeros(BLOCKS, SIZE, layout.ROW, dtype=torch.float16)}
    with pytest.raises(ValueError, match=message):
        mla_rope_cache(**(given | {name: value}))
