"""LoRA (arXiv:2106.09685): low-rank matrices are trained beside frozen weights."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ictx.errors import UserError
from ictx.folder import replacing
from ictx.manifest import digest
from ictx.train.config import LoopConfig, LoraConfig

ADAPTER = "adapter"
"""Folder of a run with its adapter in PEFT's format."""
BASE = "base.json"
"""File in ADAPTER with the checksums of the base model's weights."""
A, B = ".lora_A", ".lora_B"
"""Suffixes of the low-rank matrices' names in state dicts."""
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj"}


class LoraLinear(nn.Linear):
    """A linear layer W·x + α/r · B·A·x; only A (rank, in) and B (out, rank) are trained."""

    adapted = True
    """Marks layers for which a product with `weight` alone would be wrong."""

    def __init__(self, linear: nn.Linear, config: LoraConfig) -> None:
        device = linear.weight.device
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.empty(config.rank, linear.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(linear.out_features, config.rank, device=device))
        self.scale, self.dropout = config.scale, config.dropout

    def forward(self, input: Tensor) -> Tensor:
        """Returns W·x + α/r · B·A·x, (…, out), for input (…, in)."""
        out = F.linear(input, self.weight)
        # During evaluation modules stay in training mode, so that the gradient mode decides.
        kept = F.dropout(input, self.dropout, self.training and torch.is_grad_enabled())
        return out + F.linear(F.linear(kept, self.lora_A), self.lora_B) * self.scale


def adapt(model: nn.Module, config: LoraConfig) -> None:
    """Freezes a model and adds adapters; call it before sharding. Raises UserError for an unknown target.

    Args:
        model: a `Transformer`, or transformers' `DeepseekV3ForCausalLM`, whose modules have the same names.
    """
    model.requires_grad_(False)
    layers = [module for module in model.get_submodule("model.layers").modules() if not isinstance(module, nn.Linear)]
    places = [(parent, name, child) for parent in layers for name, child in parent.named_children()]
    linear = [(parent, name, child) for parent, name, child in places if isinstance(child, nn.Linear)]
    known = sorted({name for _, name, _ in linear})
    for target in config.targets or ():
        if target not in known:
            raise UserError(f"train.lora.targets has {target}: expected some of {', '.join(known)}")
    for parent, name, child in linear:
        if config.targets is None or name in config.targets:
            setattr(parent, name, LoraLinear(child, config))


@torch.no_grad()
def init_adapter(model: nn.Module, seed: int) -> None:
    """Initializes A uniformly in ±in^-½, as PEFT does, and B with zeros, so that the initial output is unchanged.

    Numbers are generated on the CPU, so that they do not depend on device or sharding.
    """
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            weight = module.lora_A
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}{A}".encode()))
            full = torch.empty(weight.shape)
            full.uniform_(-(module.in_features**-0.5), module.in_features**-0.5, generator=generator)
            full = full.to(weight.device, weight.dtype)
            if isinstance(weight, DTensor):
                full = distribute_tensor(full, weight.device_mesh, weight.placements, src_data_rank=None)
            weight.copy_(full)
            module.lora_B.zero_()


def seed_dropout(loop: LoopConfig, step: int, rank: int) -> None:
    """Seeds a step's dropout, so that a resumed run has the same masks."""
    if loop.lora and loop.lora.dropout:
        torch.manual_seed(zlib.crc32(f"{loop.seed} {step} {rank}".encode()))


def merged(weights: Mapping[str, Tensor], config: LoraConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns an unsharded state dict with the adapter merged into the frozen weights, and the adapter's weights."""
    learned = {name: weight for name, weight in weights.items() if name.endswith((A, B))}
    result = {name: weight for name, weight in weights.items() if name not in learned}
    for name, a in learned.items():
        if name.endswith(A):
            stem = name.removesuffix(A)
            frozen = result[f"{stem}.weight"]
            result[f"{stem}.weight"] = frozen + (learned[f"{stem}{B}"].float() @ a.float() * config.scale).to(
                frozen.dtype
            )
    return result, learned


def write_adapter(
    directory: Path, learned: Mapping[str, Tensor], config: LoraConfig, base: Path, origin: str, dtype: torch.dtype
) -> None:
    """Writes an adapter for the model in folder `base` in the format of PEFT's `PeftModel.from_pretrained`.

    BASE has the checksums of that model's weights and its name, `origin`, because an adapter is valid only for these.
    """
    targets = {name.split(".")[-2] for name in learned}
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,  # only for training; PEFT accepts no other with target_parameters
        "target_modules": sorted(targets - FEED_FORWARD),
        # In target_modules, PEFT (0.21) takes these for experts' and skips dense layers (`_convert_peft_config_moe`).
        "target_parameters": [f"{name}.weight" for name in sorted(targets & FEED_FORWARD)],
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {
        f"base_model.model.{name}.weight": weight.to("cpu", dtype).contiguous() for name, weight in learned.items()
    }
    with replacing(directory) as draft:
        (draft / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        trained = {"origin": origin, "sha256": {file.name: digest(file).sha256 for file in base.glob("*.safetensors")}}
        (draft / BASE).write_text(json.dumps(trained, indent=2) + "\n")
        save_file(tensors, draft / "adapter_model.safetensors", metadata={"format": "pt"})
