"""Writes and reads models in the format of Hugging Face and vLLM: `DeepseekV3ForCausalLM` in safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ictx.errors import UserError
from ictx.folder import replacing
from ictx.model.config import ModelConfig
from ictx.model.hf_config import CONFIG_FILE, read_hf_config, to_hf
from ictx.model.hf_generation import GENERATION_FILE, Generation
from ictx.model.hf_tokenizer import write_tokenizer
from ictx.model.tensors import TensorFiles, write_tensors
from ictx.model.transformer import Transformer

EMBEDDING = "model.embed_tokens.weight"
MAX_SHARD_BYTES = 1 << 30
MTP = "mtp."
"""Prefix of parameters that are used only in training."""
ROUTER_BIAS = "e_score_correction_bias"
"""Stored in float32: readers add it to float32 scores, and its updates are below the resolution of 16-bit formats."""


def hf_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields one of our tensors under its names in a checkpoint, where each expert has separate tensors."""
    if name.endswith("experts.gate_up_proj"):
        for expert, both in enumerate(tensor):
            gate, up = both.chunk(2)
            stem = name.removesuffix("gate_up_proj") + str(expert)
            yield f"{stem}.gate_proj.weight", gate
            yield f"{stem}.up_proj.weight", up
    elif name.endswith("experts.down_proj"):
        for expert, down in enumerate(tensor):
            yield f"{name.removesuffix('down_proj')}{expert}.down_proj.weight", down
    else:
        yield name, tensor


def save_pretrained(
    model: Transformer,
    path: Path | str,
    tokenizer: Any = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    end_of_text: str | None = None,
    generation: Generation | None = None,
) -> None:
    """Writes the model, its configuration and tokenizer to a folder, atomically.

    Args:
        tokenizer: a folder with tokenizer.json and preferably tokenizer_config.json, or the path of tokenizer.json; or
            an object with `save_pretrained`, such as transformers' tokenizers.
        dtype: dtype of the weights; default: the model's.
        end_of_text: token that ends a document, for a tokenizer without tokenizer_config.json.
        generation: settings for text generation; default: derived from the tokenizer's special tokens.

    Raises UserError if a file cannot be written, or is damaged, or the tokenizer does not fit the model.
    """
    dtype = dtype or model.lm_head.weight.dtype
    weights = model.state_dict()
    write_pretrained(Path(path), model.config, weights, tokenizer, dtype, max_shard_bytes, end_of_text, generation)


def write_pretrained(
    directory: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    end_of_text: str | None = None,
    generation: Generation | None = None,
) -> None:
    """Same as `save_pretrained`, for the state dict of a `Transformer` with unsharded tensors."""
    with replacing(directory) as draft:
        special = write_tokenizer(draft, tokenizer, config.max_position_embeddings, config.vocab_size, end_of_text)
        generation = generation or Generation.of(special)
        _write_json(draft / CONFIG_FILE, to_hf(config, dtype, generation.tokens))
        _write_json(draft / GENERATION_FILE, generation.settings)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights.items():
                if not name.startswith(MTP):
                    kept = torch.float32 if name.endswith(ROUTER_BIAS) else dtype
                    yield from hf_tensors(name, weight.detach().to(device="cpu", dtype=kept))

        write_tensors(draft, tensors(), max_shard_bytes)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def stored_dtype(directory: Path) -> torch.dtype:
    """Returns the dtype of a folder's weights: the one in config.json, or else that of the embedding."""
    return read_hf_config(directory)[1] or TensorFiles(directory).dtype(EMBEDDING)


def load_pretrained(
    path: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """Returns the model in a folder written by this project, transformers or DeepSeek, in evaluation mode.

    Args:
        dtype: dtype of the weights; default: `stored_dtype`.

    Raises UserError naming the file and the invalid tensor or setting.
    """
    directory = Path(path)
    config, stored = read_hf_config(directory)
    files = TensorFiles(directory)
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype or stored or files.dtype(EMBEDDING))
    for router in model.routers:
        router.float_buffers()
    model.to_empty(device=device)
    for router in model.routers:
        router.tokens_per_expert.zero_()
    targets = {name: part for whole, tensor in model.state_dict().items() for name, part in hf_tensors(whole, tensor)}
    known = re.compile(r"model\.layers\.(\d+)\.")
    for name in files.files:
        layer = known.match(name)
        # Layers after the last are MTP modules, which are used only in training.
        if name not in targets and not (layer and int(layer[1]) >= config.num_hidden_layers):
            raise UserError(f"{files.files[name]}: tensor {name} does not belong to a model with this {CONFIG_FILE}")
    with torch.no_grad():
        for name, tensor in files.read({name: tuple(target.shape) for name, target in targets.items()}):
            targets[name].copy_(tensor)
    return model.eval()
