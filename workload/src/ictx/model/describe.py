"""Describes a configuration: parameters, cache size, operations, and the contexts that fit on common GPUs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ictx.kernels import layout
from ictx.model.cache import CACHE_DTYPES, bytes_per_token, quantisable
from ictx.model.config import ModelConfig
from ictx.model.hf_config import DTYPES
from ictx.model.transformer import Transformer

GIB = 2**30
CONTEXTS = {"32k": 32_768, "128k": 131_072, "1M": 1_048_576}
CARDS = (8, 24, 40, 80)
"""Memory of common GPUs, in GiB."""
USABLE = 0.9
"""Share of a GPU's memory that a server uses: vLLM's default."""
WORKSPACE = 0.75 * GIB
"""Bytes for activations of a prefill chunk, the CUDA context and allocator fragmentation."""
PARTS = {
    "embed_tokens": "embedding",
    "lm_head": "head",
    "self_attn": "attention",
    "experts": "routed experts",
    "shared_experts": "shared experts",
    "gate": "routers",
    "mlp": "feed-forward",
}


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Returns the number of parameters per part, with MTP (training only) as a separate part; allocates nothing."""
    with torch.device("meta"):
        model = Transformer(config)
    counts: dict[str, int] = {}
    for name, weight in model.named_parameters():
        steps = name.split(".")
        part = next((title for step, title in PARTS.items() if step in steps), "norms")
        if steps[0] == "mtp":
            part = "MTP (training only)"
        counts[part] = counts.get(part, 0) + weight.numel()
    return counts


def active_parameters(config: ModelConfig, further: bool = False) -> int:
    """Returns the number of parameters that process one token: no embedding, and only the selected experts.

    Args:
        further: count the MTP module without the head instead of the model.
    """
    with torch.device("meta"):
        model = Transformer(config)
    share = config.moe.num_experts_per_tok / config.moe.n_routed_experts if config.moe else 1.0
    total = 0.0
    for name, weight in model.named_parameters():
        if name.startswith("mtp.") == further and "embed_tokens" not in name:
            total += weight.numel() * (share if ".experts." in name else 1.0)
    return round(total)


def flops_per_token(config: ModelConfig, context: int, *, absorbed: bool) -> int:
    """Returns the operations of one token's forward pass over `context` tokens; a training step takes 3 times as many.

    Two per active parameter, and two per value of the attended keys and values.
    """
    width = 2 * config.kv_lora_rank + config.qk_rope_head_dim if absorbed else config.qk_head_dim + config.v_head_dim
    attention = 2 * config.num_attention_heads * width * context * config.num_hidden_layers
    return 2 * active_parameters(config) + attention


def longest_context(config: ModelConfig, card_gib: int, weights: int, cache: int) -> int:
    """Returns the cached tokens that fit on a GPU with `weights` bytes of weights; `cache` is bytes per token."""
    free = card_gib * GIB * USABLE - weights - WORKSPACE
    return max(0, min(int(free // cache), config.max_position_embeddings))


def caches(config: ModelConfig) -> dict[str, int]:
    """Returns the bytes per token of each cache dtype that the model supports; quantised ones have 16-bit keys."""
    found = {name: bytes_per_token(config, dtype) for name, dtype in CACHE_DTYPES.items()}
    if quantisable(config):
        found |= {name: bytes_per_token(config, torch.bfloat16, name) for name in layout.QUANTISED}
    return found


def describe(config: ModelConfig, context: int) -> Iterator[str]:
    """Yields the lines of a table that describes a configuration; operations are for `context` tokens."""
    counts = parameters_by_part(config)
    total = sum(count for part, count in counts.items() if not part.startswith("MTP"))
    yield "parameters"
    for part, count in sorted(counts.items(), key=lambda item: -item[1]):
        yield _row(part, f"{count:,}")
    yield _row("total", f"{total:,}")
    if config.moe:
        yield _row("active per token", f"{active_parameters(config) + counts['embedding']:,}")
    yield "weights"
    for name, dtype in DTYPES.items():
        yield _row(name, f"{total * dtype.itemsize:,} bytes ({total * dtype.itemsize / GIB:.2f} GiB)")
    yield "latent cache"
    lengths = {name: length for name, length in CONTEXTS.items() if length <= config.max_position_embeddings}
    held = caches(config)
    for name, per_token in held.items():
        sizes = [f"{length * per_token / GIB:.2f} GiB at {title}" for title, length in lengths.items()]
        yield _row(name, ", ".join([f"{per_token:,} bytes/token", *sizes]))
    if not quantisable(config):
        names = ", ".join(layout.QUANTISED)
        yield _row(names, f"only latents of {layout.LATENT} and keys of {layout.ROPE} values are quantised")
    yield f"operations per token at {context:,} tokens of context"
    yield _row("decode (absorbed)", _operations(flops_per_token(config, context, absorbed=True)))
    mean = flops_per_token(config, context // 2, absorbed=False)
    yield _row("prefill (expanded), mean over the context", _operations(mean))
    yield _row("training, mean over the context", _operations(3 * mean))
    weights = total * 2
    yield (
        "GPUs: cached tokens that fit in addition to weights in bfloat16, at most the model's context "
        f"({USABLE:.0%} of the memory, {WORKSPACE / GIB:.2f} GiB of workspace)"
    )
    for card in CARDS:
        if longest_context(config, card, weights, min(held.values())) == 0:
            yield _row(f"{card} GB", "weights do not fit")
            continue
        verdicts = []
        for per_token in sorted(set(held.values()), reverse=True):
            names = ", ".join(name for name, size in held.items() if size == per_token)
            fits = longest_context(config, card, weights, per_token)
            verdicts.append(f"{fits:,} ({names})")
        yield _row(f"{card} GB", ", ".join(verdicts))


def _row(name: str, value: str) -> str:
    return f"  {name:<42} {value}"


def _operations(count: int) -> str:
    return f"{count / 1e9:,.2f} GFLOP"
