"""Writes and reads a model the way Hugging Face and vLLM do: `DeepseekV3ForCausalLM` in safetensors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ictx.errors import UserError
from ictx.folder import replacing
from ictx.model.config import ModelConfig
from ictx.model.hf_config import CONFIG_FILE, read_hf_config, to_hf
from ictx.model.tensors import TensorFiles, write_tensors
from ictx.model.transformer import Transformer

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
OTHER_TOKENIZER_FILES = ("special_tokens_map.json", "chat_template.jinja")
TURN_END = "<|im_end|>"
"""Ends the model's turn in a chat, where the vocabulary has it."""
MAX_SHARD_BYTES = 1 << 30
MTP = "mtp."
"""Begins the names of what only trains the model."""
ROUTER_BIAS = "e_score_correction_bias"
"""Stays float32: readers add it to float32 scores, and its steps are smaller than those of half precision."""


def hf_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields a tensor of ours under the names that it has in a checkpoint: experts there are tensors of their own."""
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
) -> None:
    """Writes the model, its configuration and tokenizer to a folder, which appears complete or not at all.

    Args:
        tokenizer: a folder with tokenizer.json, best with tokenizer_config.json, or that file; or an object with
            `save_pretrained`, such as transformers' tokenizers.
        dtype: of the weights; the model's own unless given.
        end_of_text: token that ends a document, for a tokenizer that comes without tokenizer_config.json.

    Raises UserError when a file cannot be written or other readers would compute something else.
    """
    dtype = dtype or model.lm_head.weight.dtype
    write_pretrained(Path(path), model.config, model.state_dict(), tokenizer, dtype, max_shard_bytes, end_of_text)


def write_pretrained(
    directory: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    end_of_text: str | None = None,
) -> None:
    """Does what `save_pretrained` does with a `Transformer`'s state dict, each tensor whole."""
    with replacing(directory) as draft:
        special = write_tokenizer(draft, tokenizer, config.max_position_embeddings, end_of_text)
        end, padding = special.get("eos_token"), special.get("pad_token")
        _write_json(draft / CONFIG_FILE, to_hf(config, dtype, end, padding))
        stops = sorted({number for number in (end, special.get(TURN_END)) if number is not None})
        generation: dict[str, Any] = {"do_sample": False, "pad_token_id": padding}
        _write_json(draft / "generation_config.json", generation | {"eos_token_id": stops or None})

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights.items():
                if not name.startswith(MTP):
                    kept = torch.float32 if name.endswith(ROUTER_BIAS) else dtype
                    yield from hf_tensors(name, weight.detach().to(device="cpu", dtype=kept))

        write_tensors(draft, tensors(), max_shard_bytes)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_tokenizer(directory: Path, tokenizer: Any, longest: int, end_of_text: str | None = None) -> dict[str, int]:
    """Puts a tokenizer's files there; returns the numbers of its special tokens by their part (`eos_token`, …)."""
    if tokenizer is None:
        return {}
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(directory)
    else:
        source = Path(tokenizer)
        folder = source if source.is_dir() else source.parent
        shutil.copyfile(folder / TOKENIZER_FILE if source.is_dir() else source, directory / TOKENIZER_FILE)
        for name in (TOKENIZER_CONFIG_FILE, *OTHER_TOKENIZER_FILES):
            if (folder / name).exists():
                shutil.copyfile(folder / name, directory / name)
    path = directory / TOKENIZER_CONFIG_FILE
    settings = json.loads(path.read_text()) if path.exists() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    if end_of_text:
        settings = {"eos_token": end_of_text, "pad_token": end_of_text} | settings
    # vLLM caps the context at this length without a word.
    settings["model_max_length"] = longest
    _write_json(path, settings)
    numbers = {token["content"]: token["id"] for token in _added_tokens(directory / TOKENIZER_FILE)}
    roles = {role: _text(settings.get(role)) for role in ("eos_token", "pad_token")} | {TURN_END: TURN_END}
    return {role: numbers[text] for role, text in roles.items() if text in numbers}


def _added_tokens(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads(path.read_text())["added_tokens"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no tokenizer: {error!r}") from error


def _text(token: Any) -> Any:
    """Returns a special token's text: settings have it bare or with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def load_pretrained(
    path: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """Returns the model in a folder that this project, transformers or DeepSeek wrote, in evaluation mode.

    Args:
        dtype: of the weights; that of the folder's config.json unless given.

    Raises UserError naming the file and the tensor, or the setting, that is wrong.
    """
    directory = Path(path)
    config, stored = read_hf_config(directory)
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype or stored)
    for router in model.routers:
        router.float_buffers()
    model.to_empty(device=device)
    for router in model.routers:
        router.tokens_per_expert.zero_()
    targets = {name: part for whole, tensor in model.state_dict().items() for name, part in hf_tensors(whole, tensor)}
    files = TensorFiles(directory)
    known = re.compile(r"model\.layers\.(\d+)\.")
    for name in files.files:
        layer = known.match(name)
        # Layers behind the last predict further tokens: they train a model and are not part of it.
        if name not in targets and not (layer and int(layer[1]) >= config.num_hidden_layers):
            raise UserError(f"{files.files[name]}: tensor {name} is no part of a model with this {CONFIG_FILE}")
    with torch.no_grad():
        for name, tensor in files.read({name: tuple(target.shape) for name, target in targets.items()}):
            targets[name].copy_(tensor)
    return model.eval()
