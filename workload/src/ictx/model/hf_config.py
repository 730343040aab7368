"""Writes and reads config.json of `DeepseekV3ForCausalLM`."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ictx.errors import UserError
from ictx.model.config import ModelConfig, MoeConfig
from ictx.settings import build, shown

ARCHITECTURE = "DeepseekV3ForCausalLM"
CONFIG_FILE = "config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
"""Keys that readers require, with the only values that this model supports."""
DEFAULT_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
DEFAULTS: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
"""Defaults of transformers' `DeepseekV3Config` for missing keys, in addition to `DEFAULT_TOKENS`."""


def to_hf(config: ModelConfig, dtype: torch.dtype, tokens: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Returns the content of config.json.

    Args:
        tokens: `bos_token_id`, `eos_token_id` and `pad_token_id`; default: null.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn:
        rope |= {"rope_type": "yarn"} | {name: float(getattr(config.yarn, name)) for name in YARN_NAMES}
        rope["original_max_position_embeddings"] = config.yarn.original_max_position_embeddings
    # In a dense model every layer precedes the first one with experts. Readers still compute with the sizes of experts,
    # so they must be valid.
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
        "use_cache": True,
        **{name: tokens.get(name) for name in DEFAULT_TOKENS},
        **{name: getattr(moe, name) for name in MOE_NAMES},
        **FIXED,
        # MTP modules are used only in training and not exported.
        "num_nextn_predict_layers": 0,
    }


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises UserError naming a file that is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {shown(str(error))}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys and values")
    return content


def read_hf_config(directory: Path) -> tuple[ModelConfig, torch.dtype | None]:
    """Returns a folder's configuration and its dtype, if set. Raises UserError naming the file and the invalid key."""
    path = directory / CONFIG_FILE
    if not path.exists():
        raise UserError(f"{path} is missing: {directory} is not a model's folder")
    content = read_object(path)
    try:
        return _from_hf(content), _dtype(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _from_hf(content: dict[str, Any]) -> ModelConfig:
    if content.get("architectures") != [ARCHITECTURE]:
        raise UserError(f"architectures is {reprlib.repr(content.get('architectures'))}: expected ['{ARCHITECTURE}']")
    if content.get("quantization_config"):
        raise UserError("quantization_config is given: expected weights that are not quantized")
    if content.get("per_layer_config"):
        raise UserError("per_layer_config is given: expected one configuration for all layers")
    for name, value in FIXED.items():
        _require(content, name, value)
    given = DEFAULTS | content
    values = {name: given[name] for name in SAME_NAMES} | _rope(given)
    # Validate the types of sizes before comparing them.
    config = build(ModelConfig, values)
    if given["num_key_value_heads"] is not None:
        _require(given, "num_key_value_heads", config.num_attention_heads, "num_attention_heads, ")
    # transformers uses each of these, if present, instead of the value derived from other keys.
    _require(content, "head_dim", config.qk_rope_head_dim, "qk_rope_head_dim, ")
    _require(content, "qk_head_dim", config.qk_head_dim, "qk_nope_head_dim + qk_rope_head_dim, ")
    _require(content, "num_local_experts", given["n_routed_experts"], "n_routed_experts, ")
    dense = given["first_k_dense_replace"]
    if type(dense) is int and dense >= config.num_hidden_layers:
        return config
    return build(ModelConfig, values | {"moe": {name: given[name] for name in MOE_NAMES}})


def _require(content: dict[str, Any], name: str, value: Any, what: str = "") -> None:
    """Raises UserError if a key is present with another value."""
    if content.get(name, value) != value:
        raise UserError(f"{name} is {reprlib.repr(content[name])}: expected {what}{value!r}")


def _rope(given: dict[str, Any]) -> dict[str, Any]:
    """Returns rope_theta and yarn as transformers reads them: `rope_scaling`, the older key, takes precedence.

    Raises UserError naming a key that readers interpret differently or that some ignore.
    """
    where = "rope_scaling" if given.get("rope_scaling") else "rope_parameters"
    rope = given.get(where) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where} is {reprlib.repr(rope)}: expected keys and values")
    kind = rope.get("rope_type", rope.get("type", "default"))
    values: dict[str, Any] = {"rope_theta": rope.get("rope_theta", given.get("rope_theta", 10000.0))}
    for place in (given, rope):
        if place.get("partial_rotary_factor") is not None:
            _require(place, "partial_rotary_factor", 1.0)
    if kind == "default":
        return values
    if kind != "yarn":
        raise UserError(f"{where}.rope_type is {reprlib.repr(kind)}: expected default or yarn")
    for name, value in {"attention_factor": None, "truncate": True}.items():
        if rope.get(name, value) != value:
            raise UserError(f"{where}.{name} is {reprlib.repr(rope[name])}: expected {value!r}")
    yarn = {name: rope[name] for name in YARN_NAMES if rope.get(name) is not None}
    yarn.setdefault("original_max_position_embeddings", given["max_position_embeddings"])
    _require(given, "original_max_position_embeddings", yarn["original_max_position_embeddings"], f"that of {where}, ")
    # Either both are given, or YaRN's default factor applies to cosine and sine, and none to the scores.
    if "mscale" not in yarn and yarn.get("mscale_all_dim"):
        raise UserError(
            f"{where}.mscale is missing, but mscale_all_dim is given: set both, or readers interpret them differently"
        )
    values["yarn"] = {"mscale": 1.0, "mscale_all_dim": 0.0} | yarn
    return values


def _dtype(content: dict[str, Any]) -> torch.dtype | None:
    name = content.get("dtype") or content.get("torch_dtype")
    if name is None:
        return None
    if not isinstance(name, str) or name not in DTYPES:
        raise UserError(f"dtype is {reprlib.repr(name)}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name]
