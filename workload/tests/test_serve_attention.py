"""Conditions under which our attention replaces vLLM's, and its parts in PyTorch. Does not need vLLM."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from itertools import pairwise
from typing import Any

import pytest
import torch

from ictx.errors import UserError
from ictx.kernels import dispatch
from ictx.serve import vllm_plugin
from ictx.serve.ragged import attend_ragged
from ictx.serve.vllm_choice import VARIABLE, Served, prefills, refused, refused_version, wanted

FACTS: dict[str, Any] = {
    "device": "cuda",
    "capability": 90,
    "dtype": torch.bfloat16,
    "cache_dtype": "auto",
    "block_size": None,
    "latent": 512,
    "rope": 64,
    "heads": 16,
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates that Triton is installed and not in its interpreter; nothing is launched."""
    monkeypatch.setattr(dispatch, "have_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"capability": 80, "dtype": torch.float16, "cache_dtype": "float16", "block_size": 16}, None),
        ({"block_size": 64, "heads": 128, "queries": 8}, None),
        ({"amx": True}, None),
        ({"capability": 75, "dtype": torch.float16}, None),
        ({"capability": 75}, "compute capability 7.5 has no bfloat16"),
        ({"capability": 70, "dtype": torch.float16}, "compute capability 7.0 is below 7.5"),
        ({"dtype": torch.float32}, "dtype float32 is neither float16 nor bfloat16"),
        ({"cache_dtype": "fp8"}, "the layout of a fp8 cache differs from ours: the cache must be bfloat16"),
        ({"cache_dtype": "float16"}, "the layout of a float16 cache differs from ours: the cache must be bfloat16"),
        ({"block_size": 48}, "block size 48 is not 16, 32, 64 or another power of 2"),
        ({"block_size": 8}, "block size 8 is not 16, 32, 64 or another power of 2"),
        ({"latent": 256}, "a cached token has 256 + 64 values, ours 512 + 64"),
        ({"latent": 0, "rope": 0}, "a cached token has 0 + 0 values, ours 512 + 64"),
        ({"heads": 129}, "129 heads per rank exceed 128"),
        ({"queries": 9}, "9 new tokens per sequence exceed 8"),
        ({"backend": "FLASHMLA"}, "FLASHMLA is requested by name"),
        ({"other": ("sparse attention is requested",)}, "sparse attention is requested"),
        ({"device": "xpu"}, "device xpu is neither a CPU nor an NVIDIA GPU"),
        ({"device": "cpu", "capability": 0, "dtype": torch.float32}, None),
        ({"device": "cpu", "capability": 0, "backend": "CPU_MLA"}, None),
        ({"device": "cpu", "capability": 0, "amx": True}, "vLLM uses its AMX back end on this CPU"),
    ],
)
def test_a_refusal_names_its_reason(changes: dict[str, Any], reason: str | None) -> None:
    assert refused(Served(**FACTS | changes)) == reason


def test_without_kernels_vllm_s_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert refused(Served(**FACTS)) == "ICTX_KERNELS=torch"
    cpu = Served(**FACTS | {"device": "cpu", "capability": 0})
    assert refused(cpu) is None
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    reason = refused(Served(**FACTS | {"dtype": torch.float32}))
    assert reason is not None and reason.startswith("ICTX_KERNELS=triton, but mla_decode cannot use Triton here")
    assert refused(cpu) == f"{reason.split(': ')[0]}: device cpu is not an NVIDIA GPU"
    monkeypatch.delenv(dispatch.VARIABLE)
    monkeypatch.setattr(dispatch, "have_triton", lambda: False)
    assert refused(Served(**FACTS)) == "Triton is not installed"


def test_prefill_is_ours_where_vllm_has_none() -> None:
    turing = Served(**FACTS | {"capability": 75, "dtype": torch.float16})
    assert prefills(turing, None)
    assert not prefills(turing, "FLASH_ATTN")
    assert not prefills(Served(**FACTS | {"capability": 80}), None)
    assert prefills(Served(**FACTS | {"device": "cpu", "capability": 0}), None)
    assert not prefills(Served(**FACTS | {"device": "cpu", "capability": 0, "latent": 256}), None)
    assert not prefills(Served(**FACTS | {"device": "xpu", "capability": 0}), None)


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not wanted()
    for value, expected in {"": False, "vllm": False, "ictx": True}.items():
        monkeypatch.setenv(VARIABLE, value)
        assert wanted() is expected
    monkeypatch.setenv(VARIABLE, "Ictx")
    with pytest.raises(UserError, match=r"ICTX_VLLM_ATTENTION is 'Ictx': expected ictx or vllm"):
        vllm_plugin.register()


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1.post1", "0.32.0+cpu"])
def test_the_version_that_it_is_written_for(version: str) -> None:
    assert refused_version(version) is None


@pytest.mark.parametrize("version", ["0.3.2", "0.33.0", "0.320.0", "dev"])
def test_another_version_is_refused(version: str) -> None:
    assert refused_version(version) == f"vLLM {version} is not supported: expected 0.32"


def test_vllm_finds_the_plugin_and_it_loads_nothing_unless_asked() -> None:
    (found,) = entry_points(group="vllm.general_plugins", name="ictx")
    assert found.load() is vllm_plugin.register
    program = (
        "import sys, ictx.cli, ictx.serve.vllm_plugin as plugin; plugin.register(); "
        "sys.exit(any(name.split('.')[0] == 'vllm' for name in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"ICTX_VLLM_ATTENTION": "vllm"})


@pytest.mark.parametrize("workspace", [1, 8 * 3 * 70 * 7, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sequences_attend_to_themselves_alone(dtype: torch.dtype, workspace: int) -> None:
    generator = torch.Generator().manual_seed(5)
    lengths, contexts, heads = [1, 7, 64, 17], [33, 0, 6, 1], 3
    scale = 0.3
    totals = [new + old for new, old in zip(lengths, contexts, strict=True)]
    starts = [sum(totals[:i]) for i in range(5)]
    q = torch.randn(sum(totals), heads, 24, generator=generator, dtype=torch.float64).to(dtype)
    k = torch.randn(sum(totals), heads, 24, generator=generator, dtype=torch.float64).to(dtype)
    v = torch.randn(sum(totals), heads, 16, generator=generator, dtype=torch.float64).to(dtype)
    out, lse = attend_ragged(q, k, v, starts, starts, scale, causal=True, workspace=workspace)
    for first, end in pairwise(starts):
        q_1, k_1, v_1 = (x[first:end].double() for x in (q, k, v))
        score = torch.einsum("qhd,khd->hqk", q_1, k_1) * scale
        score.masked_fill_(torch.ones_like(score, dtype=torch.bool).triu(1), -torch.inf)
        expected = torch.einsum("hqk,khv->qhv", score.softmax(-1), v_1)
        bound = {torch.float64: 1e-7, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(out[first:end].double(), expected, rtol=bound, atol=bound)
        torch.testing.assert_close(lse[:, first:end].double(), score.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("workspace", [1, 1 << 20])
def test_new_tokens_and_cached_ones_join_by_their_log_sum_exps(workspace: int) -> None:
    generator = torch.Generator().manual_seed(6)
    q, k = (torch.randn(40, 2, 24, generator=generator) for _ in range(2))
    v = torch.randn(40, 2, 16, generator=generator)
    whole, lse = attend_ragged(q, k, v, [0, 40], [0, 40], 0.2, causal=True, workspace=workspace)
    new, lse_new = attend_ragged(q[25:], k[25:], v[25:], [0, 15], [0, 15], 0.2, causal=True, workspace=workspace)
    old, lse_old = attend_ragged(q[25:], k[:25], v[:25], [0, 15], [0, 25], 0.2, causal=False, workspace=workspace)
    both = torch.logaddexp(lse_new, lse_old)
    joined = new * (lse_new - both).exp().T[..., None] + old * (lse_old - both).exp().T[..., None]
    torch.testing.assert_close(both, lse[:, 25:])
    torch.testing.assert_close(joined, whole[25:])
