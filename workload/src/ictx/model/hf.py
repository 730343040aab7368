"""Writes a model the way Hugging Face and vLLM read it: `DeepseekV3ForCausalLM` in safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ictx.model.config import ModelConfig

TOKENIZER_FILE = "tokenizer.json"


def hf_config(config: ModelConfig, dtype: torch.dtype, end_of_text: int) -> dict[str, Any]:
    """Returns the content of config.json."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn:
        rope |= {
            "rope_type": "yarn",
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_max_position_embeddings,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            "mscale": config.yarn.mscale,
            "mscale_all_dim": config.yarn.mscale_all_dim,
        }
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "qk_head_dim": config.qk_head_dim,
        "v_head_dim": config.v_head_dim,
        "head_dim": config.qk_rope_head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "rope_interleave": True,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        # Every layer is dense. The number of experts must stay an int all the same: readers do arithmetic with it.
        "first_k_dense_replace": config.num_hidden_layers,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": config.intermediate_size,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


def export(
    directory: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Path,
    end_of_text: tuple[int, str],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes model, configuration and tokenizer to `directory`, which appears complete or not at all.

    Args:
        weights: a `Transformer`'s state dict, each tensor whole and on the CPU.
        tokenizer: a `tokenizer.json`.
        end_of_text: id and text of the token that ends a document.
    """
    draft = directory.with_name(directory.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    number, text = end_of_text
    save_file(
        {name: weight.to(dtype).contiguous() for name, weight in weights.items()},
        draft / "model.safetensors",
        metadata={"format": "pt"},
    )
    generation = {"eos_token_id": number, "pad_token_id": number, "do_sample": False}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": text,
        "pad_token": text,
        # vLLM caps the context at this length without a word.
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    contents = {
        "config.json": hf_config(config, dtype, number),
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer_config,
    }
    for name, content in contents.items():
        (draft / name).write_text(json.dumps(content, indent=2) + "\n")
    shutil.copyfile(tokenizer, draft / TOKENIZER_FILE)
    shutil.rmtree(directory, ignore_errors=True)
    draft.replace(directory)
