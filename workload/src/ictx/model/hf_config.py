"""config.json of `DeepseekV3ForCausalLM`, there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ictx.errors import UserError
from ictx.model.config import ModelConfig, MoeConfig
from ictx.settings import build

ARCHITECTURE = "DeepseekV3ForCausalLM"
CONFIG_FILE = "config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NORM_EPS = 1e-6
"""transformers' norms of the latents have this epsilon whatever the configuration says, vLLM's what it says."""
SAME_NAMES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
]
MOE_NAMES = [
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_shared_experts",
    "n_group",
    "topk_group",
    "first_k_dense_replace",
    "norm_topk_prob",
    "routed_scaling_factor",
]
YARN_NAMES = ["factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"]
FIXED: dict[str, Any] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rms_norm_eps": NORM_EPS,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
"""What readers ask for and this model has no choice in."""


def to_hf(config: ModelConfig, dtype: torch.dtype, end_of_text: int | None, padding: int | None) -> dict[str, Any]:
    """Returns the content of config.json. Raises UserError when other readers would compute something else from it."""
    if config.rms_norm_eps != NORM_EPS:
        raise UserError(f"rms_norm_eps is {config.rms_norm_eps}: expected {NORM_EPS}, which transformers always takes")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn:
        rope |= {"rope_type": "yarn"} | {name: float(getattr(config.yarn, name)) for name in YARN_NAMES}
        rope["original_max_position_embeddings"] = config.yarn.original_max_position_embeddings
    # Every layer of a dense model is before the first with experts. Readers do arithmetic with the number of experts
    # all the same, so it must be one.
    moe = config.moe or MoeConfig(
        n_routed_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=config.intermediate_size,
        first_k_dense_replace=config.num_hidden_layers,
    )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "deepseek_v3",
        "dtype": str(dtype).removeprefix("torch."),
        **{name: getattr(config, name) for name in SAME_NAMES},
        "num_key_value_heads": config.num_attention_heads,
        "qk_head_dim": config.qk_head_dim,
        "head_dim": config.qk_rope_head_dim,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": padding,
        **{name: getattr(moe, name) for name in MOE_NAMES},
        **FIXED,
        # Modules that predict further are for training: they are not exported.
        "num_nextn_predict_layers": 0,
    }


def read_hf_config(directory: Path) -> tuple[ModelConfig, torch.dtype]:
    """Returns a folder's configuration and the dtype of its weights. Raises UserError naming what is wrong in it."""
    path = directory / CONFIG_FILE
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {directory} holds no model") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values")
    try:
        return _from_hf(content), _dtype(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _from_hf(content: dict[str, Any]) -> ModelConfig:
    if content.get("architectures") != [ARCHITECTURE]:
        raise UserError(f"architectures is {content.get('architectures')}: expected ['{ARCHITECTURE}']")
    if content.get("quantization_config"):
        raise UserError("quantization_config is given: expected weights that are not quantized")
    for name, value in FIXED.items():
        if content.get(name, value) != value:
            raise UserError(f"{name} is {content[name]!r}: expected {value!r}")
    heads = content.get("num_attention_heads")
    if content.get("num_key_value_heads", heads) not in (heads, None):
        raise UserError(
            f"num_key_value_heads is {content['num_key_value_heads']}: expected num_attention_heads, {heads}"
        )
    values = {name: content[name] for name in SAME_NAMES if name in content}
    values |= _rope(content)
    layers = content.get("num_hidden_layers")
    dense = content.get("first_k_dense_replace", 0)
    if content.get("n_routed_experts") and isinstance(layers, int) and isinstance(dense, int) and dense < layers:
        values["moe"] = {name: content[name] for name in MOE_NAMES if name in content}
    return build(ModelConfig, values)


def _rope(content: dict[str, Any]) -> dict[str, Any]:
    """Returns rope_theta and yarn from `rope_parameters`, or from where configurations of older readers have them."""
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    values: dict[str, Any] = {"rope_theta": rope.get("rope_theta", content.get("rope_theta", 10000.0))}
    if kind == "yarn":
        for name, value in {"attention_factor": None, "truncate": True}.items():
            if rope.get(name, value) != value:
                raise UserError(f"rope_parameters.{name} is {rope[name]!r}: expected {value!r}")
        values["yarn"] = {name: rope[name] for name in YARN_NAMES if name in rope}
    elif kind != "default":
        raise UserError(f"rope_parameters.rope_type is {kind!r}: expected default or yarn")
    return values


def _dtype(content: dict[str, Any]) -> torch.dtype:
    name = content.get("dtype") or content.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise UserError(f"dtype is {name!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]
