"""vLLM serves exported models: its greedy tokens equal ours, with its attention and with ours as a plug-in.

Requires `ICTX_VLLM_PYTHON=/path/to/python`, an interpreter with vLLM's CPU build and this package
(`scripts/test-vllm` installs one).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models import small

from ictx.infer.generate import generate
from ictx.model import MoeConfig, Transformer, YarnConfig
from ictx.model.hf import save_pretrained

PYTHON = os.environ.get("ICTX_VLLM_PYTHON", "")
NEW_TOKENS = 64
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
# Offline inference with the settings that vLLM's CPU build needs: its rotary operator for the CPU silently gives wrong
# queries of latent attention, so only PyTorch's operators are used. Its back end for processors with AMX supports only
# bfloat16.
PROGRAM = """
import gc, json, sys
from vllm import LLM, SamplingParams, TokensPrompt

def main():
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in json.load(open("prompts.json"))]
    settings = SamplingParams(temperature=0.0, max_tokens=int(sys.argv[1]), ignore_eos=True, detokenize=False)
    results = {}
    for name in sys.argv[3:]:
        model = LLM(name, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=256,
                    attention_backend="CPU_MLA", compilation_config={"custom_ops": ["none"]},
                    **json.loads(sys.argv[2]))
        results[name] = [list(result.outputs[0].token_ids) for result in model.generate(prompts, settings)]
        del model
        gc.collect()
    json.dump(results, open("results.json", "w"))

if __name__ == "__main__":
    main()
"""
# The classes for GPUs, run on the CPU: the implementation (except vLLM's write to the cache, a CUDA kernel) and the
# builder, with which several tokens of a sequence are decoded at once in speculative decoding.
GPU_CLASSES = """
import ictx.serve.vllm_attention as ours
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

class Impl(ours.CudaImpl):
    do_kv_cache_update = CPUMLAImpl.do_kv_cache_update

    def forward_mqa(self, q, cache, metadata, layer):
        if len(q[0]) > len(metadata.decode.seq_lens):
            ours._ran("several tokens at once")
        return super().forward_mqa(q, cache, metadata, layer)

ours.CpuBackend.get_impl_cls = staticmethod(lambda: Impl)
ours.CpuBackend.get_builder_cls = staticmethod(lambda: ours.CudaBuilder)
"""
SPECULATIVE = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 2,
    }
}
# The selection of vLLM's code for NVIDIA GPUs, without a GPU: stubs of a CUDA platform with a given compute capability
# and of the wheel's compiled part. Nothing is computed.
CHOICE = """
import json, sys, types
sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")
import vllm.platforms
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.cuda import CudaPlatformBase
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum
from vllm.v1.attention.selector import get_attn_backend
import ictx.serve.vllm_attention as ours
from ictx.kernels import dispatch
from ictx.serve import vllm_plugin

vllm_plugin.register()  # vLLM does it again
dispatch.have_triton = lambda: True

results = []
for capability, settings in json.load(sys.stdin):
    config = EngineArgs(model="dense", skip_tokenizer_init=True, max_model_len=256, **settings).create_engine_config()
    # The CPU's platform has made its choice by now.
    config.cache_config.block_size = settings.get("block_size", 16)
    class Gpu(CudaPlatformBase):
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(*divmod(capability, 10)))
        get_device_name = classmethod(lambda cls, device_id=0: "none")
    cpu, vllm.platforms._current_platform = vllm.platforms.current_platform, Gpu()
    ours.current_platform = Gpu()
    cache = config.cache_config.cache_dtype
    with set_current_vllm_config(config):
        chosen = get_attn_backend(576, config.model_config.dtype, cache, use_mla=True, num_heads=capability)
        try:
            prefill = MLAPrefillBackendEnum.FLASH_ATTN.get_class().__name__
        except ImportError:
            prefill = "not in this build"
    vllm.platforms._current_platform = cpu
    results.append([chosen.__name__, prefill, chosen.get_preferred_block_size(16)])
json.dump(results, open("chosen.json", "w"))
"""
MOE = MoeConfig(
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON, reason="ICTX_VLLM_PYTHON is not set"),
]


@dataclass(frozen=True)
class Exports:
    """A folder with a dense model, a model with experts, and prompts."""

    folder: Path
    models: dict[str, Transformer]
    prompts: list[list[int]]

    def run(self, program: str, *arguments: str, attention: str, given: str = "") -> str:
        """Runs a program in vLLM's interpreter and returns its output."""
        ended = subprocess.run(
            [PYTHON, "-c", program, *arguments] if given else [PYTHON, self._written(program), *arguments],
            cwd=self.folder,
            env=os.environ | SETTINGS | {"ICTX_VLLM_ATTENTION": attention},
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert ended.returncode == 0, ended.stdout[-8000:]
        return ended.stdout

    def _written(self, program: str) -> Path:
        """Writes the program to a file, which vLLM's child processes import again."""
        file = self.folder / "program.py"
        file.write_text(program)
        return file


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Exports of a dense model and one with experts."""
    folder = tmp_path_factory.mktemp("vllm")
    models = {
        name: small(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=384,
            q_lora_rank=64,
            yarn=YarnConfig(factor=4, original_max_position_embeddings=64),
            moe=moe,
        )
        for name, moe in (("dense", None), ("moe", MOE))
    }
    for name, model in models.items():
        save_pretrained(model, folder / name, max_shard_bytes=1_000_000)
    generator = torch.Generator().manual_seed(11)
    lengths = [3, 17, 33, 48, 5, 64, 100, 21]
    prompts = [torch.randint(512, (length,), generator=generator).tolist() for length in lengths]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return Exports(folder, models, prompts)


@dataclass(frozen=True)
class Served:
    """vLLM's results for both models, and its log."""

    tokens: dict[str, list[list[int]]]
    log: str


@pytest.fixture(scope="module")
def serve(exports: Exports) -> Callable[[str], Served]:
    """Returns a function that serves with the attention `vllm` or `ictx`, once each."""

    @functools.cache
    def serve(attention: str) -> Served:
        log = exports.run(PROGRAM, str(NEW_TOKENS), "{}", *exports.models, attention=attention)
        return Served(json.loads((exports.folder / "results.json").read_text()), log)

    return serve


@pytest.mark.parametrize("attention", ["vllm", "ictx"])
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_vllm_s_greedy_tokens_are_ours(
    name: str, attention: str, exports: Exports, serve: Callable[[str], Served]
) -> None:
    for prompt, tokens in zip(exports.prompts, serve(attention).tokens[name], strict=True):
        assert list(generate(exports.models[name], prompt, max_new_tokens=NEW_TOKENS)) == tokens


def test_our_attention_runs_where_it_is_asked_for_and_only_there(serve: Callable[[str], Served]) -> None:
    ran = [
        "our attention replaces CPU_MLA",
        "ictx computes decoding: mla_decode, 2 heads, blocks of 16, torch.float32 on cpu",
        "ictx computes prefill: 2 heads, torch.float32 on cpu",
    ]
    # Once for each model.
    assert [serve("ictx").log.count(line) for line in ran] == [2, 2, 2]
    assert "vllm_attention" not in serve("vllm").log


def test_the_gpu_s_classes_decode_several_tokens_at_once(exports: Exports, serve: Callable[[str], Served]) -> None:
    expected = serve("vllm").tokens["dense"]
    options = json.dumps(SPECULATIVE)
    log = exports.run(GPU_CLASSES + PROGRAM, str(NEW_TOKENS), options, "dense", attention="ictx")
    assert "ictx computes several tokens at once" in log
    assert json.loads((exports.folder / "results.json").read_text())["dense"] == expected


def test_vllm_chooses_ours_on_gpus_or_says_why_not(exports: Exports) -> None:
    own, half = "vLLM's own attention is used: ", {"dtype": "float16"}
    cases = [
        (90, {"dtype": "bfloat16"}, "CudaBackend", None),
        (80, half, "CudaBackend", None),
        (120, {"dtype": "bfloat16", "block_size": 64}, "CudaBackend", None),
        (75, half, "CudaBackend", None),
        (86, {"dtype": "bfloat16", "kv_cache_dtype": "fp8"}, "TritonMLABackend", "the layout of a fp8 cache differs"),
        (87, half | {"block_size": 48}, "TritonMLABackend", "block size 48 is not 16"),
        (89, half | {"attention_backend": "TRITON_MLA"}, "TritonMLABackend", "TRITON_MLA is requested by name"),
    ]
    given = json.dumps([[capability, settings] for capability, settings, *_ in cases])
    log = exports.run(CHOICE, attention="ictx", given=given)
    chosen = json.loads((exports.folder / "chosen.json").read_text())
    assert [name for name, *_ in chosen] == [expected for _, _, expected, _ in cases], log
    # FlashAttention requires Ampere or newer.
    assert [prefill == "Prefill" for _, prefill, _ in chosen] == [capability < 80 for capability, *_ in cases]
    assert {size for name, _, size in chosen if name == "CudaBackend"} == {64}
    for *_, reason in cases:
        assert reason is None or log.count(own + reason) == 1, log


def test_a_wrong_value_ends_vllm_with_its_name(exports: Exports) -> None:
    with pytest.raises(AssertionError, match="ICTX_VLLM_ATTENTION is 'ours': expected ictx or vllm"):
        exports.run("from vllm.plugins import load_general_plugins as load; load()", attention="ours")
