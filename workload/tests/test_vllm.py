"""vLLM serves what is exported, and its greedy tokens are ours.

Runs with `ICTX_VLLM_PYTHON=/path/to/python`, an interpreter that has vLLM (its CPU build will do).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from models import small

from ictx.generate import generate
from ictx.model import MoeConfig, YarnConfig
from ictx.model.hf import save_pretrained

PYTHON = os.environ.get("ICTX_VLLM_PYTHON", "")
NEW_TOKENS = 64
# Offline inference with the settings that vLLM's CPU build needs: its own rotary operator for the CPU mishandles the
# queries of latent attention without a word, so only PyTorch's operators are used.
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams, TokensPrompt

def main():
    model = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=256,
                compilation_config={"custom_ops": ["none"]})
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in json.load(open(sys.argv[2]))]
    settings = SamplingParams(temperature=0.0, max_tokens=int(sys.argv[3]), ignore_eos=True, detokenize=False)
    results = [list(result.outputs[0].token_ids) for result in model.generate(prompts, settings)]
    json.dump(results, open(sys.argv[4], "w"))

if __name__ == "__main__":
    main()
"""
MOE = MoeConfig(
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)


@pytest.mark.vllm
@pytest.mark.skipif(not PYTHON, reason="ICTX_VLLM_PYTHON names no interpreter with vLLM")
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_vllm_s_greedy_tokens_are_ours(moe: MoeConfig | None, tmp_path: Path) -> None:
    model = small(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        q_lora_rank=64,
        yarn=YarnConfig(factor=4, original_max_position_embeddings=64),
        moe=moe,
    )
    save_pretrained(model, tmp_path / "model", max_shard_bytes=1_000_000)
    generator = torch.Generator().manual_seed(11)
    lengths = [3, 17, 33, 48, 5, 64, 100, 21]
    prompts = [torch.randint(512, (length,), generator=generator).tolist() for length in lengths]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "program.py").write_text(PROGRAM)
    arguments = ["program.py", "model", "prompts.json", str(NEW_TOKENS), "results.json"]
    settings = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    ended = subprocess.run(
        [PYTHON, *arguments], cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True, timeout=1800
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    theirs = json.loads((tmp_path / "results.json").read_text())
    for prompt, tokens in zip(prompts, theirs, strict=True):
        assert list(generate(model, prompt, max_new_tokens=NEW_TOKENS)) == tokens
