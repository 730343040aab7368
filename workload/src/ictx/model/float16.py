"""Checks for overflow in float16, and rescaling of weights that preserves the model's function.

Models trained in bfloat16 may overflow in float16, whose largest number is 65,504.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ictx.errors import UserError
from ictx.model.attention import LatentAttention
from ictx.model.moe import FeedForward, GatedProduct, MoeFeedForward
from ictx.model.transformer import Layer, Transformer

LARGEST = 65504.0
MARGIN = 4.0
"""Required factor between activations and the largest number: other texts may exceed the measured activations."""
WATCHED = (nn.Linear, nn.RMSNorm, nn.Embedding, nn.Identity, GatedProduct, FeedForward, MoeFeedForward, Layer)


@contextmanager
def tracked_amax(model: nn.Module) -> Iterator[dict[str, float]]:
    """Yields the largest magnitudes of all forward passes in the block, by module and side: `model.norm output`.

    The dict is filled when the block ends. NaN counts as infinite.
    """
    largest: dict[str, Tensor] = {}
    amax: dict[str, float] = {}

    def note(name: str, values: Any) -> None:
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                peak = value.detach().abs().amax().float().nan_to_num(nan=math.inf, posinf=math.inf)
                largest[name] = torch.maximum(largest[name], peak) if name in largest else peak

    def hook(name: str) -> Any:
        def seen(module: nn.Module, inputs: Any, output: Any) -> None:
            # A layer's inputs include rotations; its first one is already recorded as the previous layer's output.
            if not isinstance(module, Layer):
                note(f"{name} input", inputs)
            note(f"{name} output", output)

        return seen

    watched = [(name, module) for name, module in model.named_modules() if isinstance(module, WATCHED)]
    handles = [module.register_forward_hook(hook(name)) for name, module in watched]
    try:
        yield amax
    finally:
        for handle in handles:
            handle.remove()
        amax |= {name: float(value) for name, value in largest.items()}


def by_layer(amax: dict[str, float]) -> dict[str, float]:
    """Returns the largest magnitude of each layer (`layers.0`) and of the other modules (`norm`, `lm_head`)."""
    layers: dict[str, float] = {}
    for name, value in amax.items():
        part = re.sub(r"^model\.", "", name.split(" ")[0])
        layer = re.match(r"layers\.\d+|[^.]+", part)
        key = layer[0] if layer else part
        layers[key] = max(layers.get(key, 0.0), value)
    return layers


@torch.inference_mode()
def measure(model: Transformer, batches: Iterable[Tensor]) -> dict[str, float]:
    """Returns the largest magnitudes over batches of tokens, and of the weights: `model.norm.weight`."""
    with tracked_amax(model) as amax:
        for input_ids in batches:
            model(input_ids)
    return amax | {name: float(weight.abs().amax()) for name, weight in model.named_parameters()}


def too_large(amax: dict[str, float]) -> dict[str, float]:
    """Returns the magnitudes within the margin of float16's largest number, the largest first."""
    found = {name: value for name, value in amax.items() if not value <= LARGEST / MARGIN}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def warning(amax: dict[str, float]) -> str | None:
    """Returns a warning about the largest magnitude that is too large for float16, or None."""
    for name, value in too_large(amax).items():
        return f"{name} reaches {value:,.0f}: rescale this model before using float16, whose maximum is {LARGEST:,.0f}"
    return None


def require_float16(amax: dict[str, float], hint: str) -> None:
    """Raises UserError with `hint`, naming the largest magnitude, if one is within the margin of float16's maximum."""
    found = too_large(amax)
    if found:
        name, value = next(iter(found.items()))
        more = f" ({len(found) - 1} others are too large as well)" if len(found) > 1 else ""
        raise UserError(
            f"{name} reaches {value:,.0f}, within {MARGIN:.0f}× of float16's largest number, {LARGEST:,.0f}{more}: "
            f"{hint}"
        )


@dataclass(frozen=True)
class Site:
    """Activations that can be scaled down without changing the model's function."""

    measured: list[str]
    """Names of the activations and weights that are scaled down."""
    shrink: list[Tensor]
    """Weights, or views of their rows, to divide."""
    grow: list[Tensor] = field(default_factory=list)
    """Weights to multiply; empty if a norm removes the scale."""


def sites(model: Transformer) -> Iterator[Site]:
    """Yields all sites of a model.

    Pairs of weights whose scales cancel: a norm's gain and the weights that read it; values, or the product in a
    feed-forward layer, and the projection after them; queries and keys. Inputs of norms, including the residual stream,
    are scaled alone. Norms add 1e-6 to the mean square, which is negligible for activations this large.
    """
    residual = Site(["model.embed_tokens output"], [model.model.embed_tokens.weight])
    for number, layer in enumerate(model.model.layers):
        assert isinstance(layer, Layer)
        name, attention, mlp = f"model.layers.{number}", layer.self_attn, layer.mlp
        yield from _attention_sites(f"{name}.self_attn", attention, f"{name}.input_layernorm", layer.input_layernorm)
        residual.measured.extend(f"{name}.{side}" for side in ("self_attn.o_proj output", "mlp output"))
        residual.measured.append(f"{name} output")
        residual.measured.extend(f"{name}.{norm} input" for norm in ("input_layernorm", "post_attention_layernorm"))
        residual.shrink.append(attention.o_proj.weight)
        readers: list[Tensor] = []
        dense = [(f"{name}.mlp", mlp)] if isinstance(mlp, FeedForward) else []
        if isinstance(mlp, MoeFeedForward):
            dense.append((f"{name}.mlp.shared_experts", mlp.shared_experts))
            experts, width = mlp.experts, mlp.experts.down_proj.shape[2]
            readers += [mlp.gate.weight, experts.gate_up_proj]
            up = experts.gate_up_proj[:, width:]
            measured = [f"{name}.mlp.experts.product {side}" for side in ("input", "output")]
            yield Site(measured, [up], [experts.down_proj])
            residual.shrink.append(experts.down_proj)
            residual.measured.append(f"{name}.mlp.experts.results output")
        for path, part in dense:
            readers += [part.gate_proj.weight, part.up_proj.weight]
            measured = [f"{path}.up_proj output", f"{path}.product output", f"{path}.down_proj input"]
            yield Site(measured, [part.up_proj.weight], [part.down_proj.weight])
            residual.shrink.append(part.down_proj.weight)
            residual.measured.append(f"{path}.down_proj output")
        norm = f"{name}.post_attention_layernorm"
        yield Site([f"{norm} output", f"{norm}.weight"], [layer.post_attention_layernorm.weight], readers)
    yield Site(["model.norm output", "model.norm.weight"], [model.model.norm.weight], [model.lm_head.weight])
    residual.measured.append("model.norm input")
    yield residual


def _attention_sites(name: str, attention: LatentAttention, norm: str, gain: nn.RMSNorm) -> Iterator[Site]:
    config, heads = attention.config, attention.config.num_attention_heads
    low_rank = config.q_lora_rank is not None
    first, last, last_name = (
        (attention.q_a_proj, attention.q_b_proj, "q_b_proj")
        if low_rank
        else (attention.q_proj, attention.q_proj, "q_proj")
    )
    kv_a, kv_b = attention.kv_a_proj_with_mqa.weight, attention.kv_b_proj.weight
    q_rows = last.weight.view(heads, config.qk_head_dim, -1)
    kv_rows = kv_b.view(heads, config.qk_nope_head_dim + config.v_head_dim, -1)
    q_nope, q_rope = q_rows[:, : config.qk_nope_head_dim], q_rows[:, config.qk_nope_head_dim :]
    k_nope, v = kv_rows[:, : config.qk_nope_head_dim], kv_rows[:, config.qk_nope_head_dim :]
    latent, k_rope = kv_a[: config.kv_lora_rank], kv_a[config.kv_lora_rank :]
    yield Site([f"{norm} output", f"{norm}.weight"], [gain.weight], [first.weight, kv_a])
    if low_rank:
        yield Site([f"{name}.q_a_proj output"], [attention.q_a_proj.weight])
        measured = [f"{name}.q_a_layernorm output", f"{name}.q_a_layernorm.weight"]
        yield Site(measured, [attention.q_a_layernorm.weight], [last.weight])
    yield Site([f"{name}.kv_a_layernorm input"], [latent])
    measured = [f"{name}.kv_a_layernorm output", f"{name}.kv_a_layernorm.weight"]
    yield Site(measured, [attention.kv_a_layernorm.weight], [kv_b])
    yield Site([f"{name}.{last_name} output"], [q_nope, q_rope], [k_nope, k_rope])
    yield Site([f"{name}.rotary_key output"], [k_rope], [q_rope])
    yield Site([f"{name}.kv_b_proj output"], [k_nope, v], [q_nope, attention.o_proj.weight])
    yield Site([f"{name}.o_proj input"], [v], [attention.o_proj.weight])


@torch.no_grad()
def rescale(model: Transformer, amax: dict[str, float]) -> list[str]:
    """Scales down, in place, what is too large for float16; returns a line per change. Measure again afterwards.

    Factors are powers of two, so that no value is rounded.
    """
    done = []
    large = too_large(amax)
    for site in sites(model):
        found = {name: large[name] for name in site.measured if math.isfinite(large.get(name, math.inf))}
        if not found:
            continue
        name, value = max(found.items(), key=lambda item: item[1])
        # Twice the required margin, so that the next measurement is not at the limit again.
        factor = 2.0 ** math.ceil(math.log2(value * 2 * MARGIN / LARGEST))
        for weight in site.shrink:
            weight.div_(factor)
        for weight in site.grow:
            weight.mul_(factor)
        done.append(f"{name}: {value:,.0f}, scaled by 1/{factor:.0f}")
    return done
