"""Estimates a rank's GPU memory in a step from the configuration, and selects the recompute mode of each layer.

The formulas count the tensors that PyTorch keeps; docs/training.md compares the estimates with measurements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ictx.model.config import MoeConfig
from ictx.model.head import LOGITS
from ictx.model.moe import AT_ONCE, MoeFeedForward
from ictx.model.transformer import Layer, Transformer
from ictx.parallel.exchange import heads_at_once, overlapped

SPARE = 4e9
"""Bytes to leave free: allocator fragmentation (measured: 1.8 to 3.1 GB) and NCCL's buffers."""
STATE = {"weights": 4, "optimizer": 8, "gradients": 4}
"""Bytes per parameter, summed over the ranks that shard it: float32, and AdamW's two moments (Muon has one)."""


@dataclass(frozen=True)
class Work:
    """The work of a rank in a forward and backward pass."""

    tokens: int
    """Tokens per rank."""
    shards: int
    """Ranks that shard the weights."""
    cp: int = 1
    """Context-parallel ranks per window."""
    size: int = 2
    """Bytes per activation value: 2 in bfloat16."""
    compiled: bool = False
    """Whether dense layers are compiled with torch.compile."""
    accumulate: bool = False
    """Whether gradients of earlier batches are held during the next one."""
    reduce_once: bool = False
    """Whether those gradients are unsharded, since they are reduced once per step."""


@dataclass(frozen=True)
class Plan:
    """The recompute mode of each layer, and the resulting memory of a rank."""

    modes: tuple[str, ...]
    """A mode of `MODES` for each layer, MTP layers last."""
    parts: dict[str, float] = field(default_factory=dict)
    """Bytes at the peak, by purpose."""

    @property
    def need(self) -> float:
        """Total bytes at the peak."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        """Returns the modes, the total and its parts."""
        modes = ", ".join(f"{mode} in {count}" for mode, count in Counter(self.modes).items())
        parts = " + ".join(f"{name} {size / 1e9:.1f}" for name, size in self.parts.items())
        return f"{modes} of {len(self.modes)} layers takes {self.need / 1e9:.1f} GB ({parts})"


def kept(layer: Layer, work: Work, mode: str) -> float:
    """Returns the bytes that a layer keeps for its backward pass."""
    config, tokens = layer.self_attn.config, work.tokens
    hidden, heads, rope = config.hidden_size, config.num_attention_heads, config.qk_rope_head_dim
    nope, value, latent = config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    result = heads * value * work.size + heads * 4  # and its log-sum-exp
    if mode == "full":
        return float(tokens * hidden * work.size)
    if mode == "selective":
        return float(tokens * (hidden * work.size + result))
    # Input, its norm, the low ranks with their norms, queries, …
    columns = 2 * hidden + 2 * (config.q_lora_rank or 0) + heads * (nope + rope) + 2 * latent + rope
    # … latents with rotated keys, or the projected keys and values, and keys with both parts, …
    columns += latent + rope if work.cp > 1 else heads * (nope + value) + heads * (nope + rope)
    # … and the feed-forward layer's input, before and after its norm.
    columns += 2 * hidden
    moe = config.moe if isinstance(layer.mlp, MoeFeedForward) else None
    if tokens <= AT_ONCE // _width(layer):
        # Gate, up and product; a compiled layer recomputes the activated gate.
        columns += (3 if work.compiled and not moe else 4) * _width(layer)
    routed = _routed(hidden, moe, work.size) if moe else 0
    return float(tokens * (columns * work.size + result + routed))


def _width(layer: Layer) -> int:
    """Returns the width of the feed-forward layer that processes every token (with experts: the shared ones)."""
    config, moe = layer.self_attn.config, layer.self_attn.config.moe
    if isinstance(layer.mlp, MoeFeedForward) and moe:
        return moe.n_shared_experts * moe.moe_intermediate_size
    return config.intermediate_size


def _routed(hidden: int, moe: MoeConfig, size: int) -> int:
    """Returns the bytes kept per token for its experts: inputs, gates and products, results, scores."""
    experts = moe.num_experts_per_tok * (2 * hidden + 4 * moe.moe_intermediate_size)
    return experts * size + 4 * (hidden + 4 * moe.n_routed_experts)


def plan(model: Transformer, work: Work, modes: tuple[str, ...]) -> Plan:
    """Returns the memory of a rank at the peak of a step; the model may be on the meta device."""
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    config, tokens, size = model.config, work.tokens, work.size
    weights = sum(weight.numel() for weight in model.parameters())
    states = {name: bytes_ * weights / work.shards for name, bytes_ in STATE.items()}
    if work.accumulate and work.reduce_once:
        states["gradients"] *= work.shards
    vocabulary = config.vocab_size * config.hidden_size
    largest = max(sum(weight.numel() for weight in layer.parameters()) for layer in layers)
    held = [kept(layer, work, mode) for layer, mode in zip(layers, modes, strict=True)]
    # The last norm's input and result; MTP's norms, projection and gradients of the head.
    held.append(tokens * config.hidden_size * size * 2)
    held.append(len(model.mtp) * (tokens * config.hidden_size * size * 8 + vocabulary * size))
    # Logits, the head's gradient in float32 and in the output dtype, and the gradient of its input.
    head = LOGITS * size + vocabulary * (4 + size) + tokens * config.hidden_size * size
    # The weights of a layer and the next one, a gradient, and its float32 copy for the reduction over ranks.
    gathered = largest * (2 * size + size + 4) + vocabulary * size
    # Recompute peaks in the last layer that recomputes, when later layers have freed their activations.
    again = [number for number, mode in enumerate(modes) if mode != "none"]
    begun = again[-1] + 1 if again else 0
    most = {"head": float(head)} if head > gathered else {"gathered layer": float(gathered)}
    in_head = {"activations": sum(held)} | most
    in_layer = {"activations": sum(held[:begun]), "layer at work": _at_work(layers, work, begun) + gathered}
    early = dict(states) if work.accumulate else {name: states[name] for name in ("weights", "optimizer")}
    # At the end all gradients exist, except those of embedding and head, which are being reduced in float32.
    own = states["gradients"] / weights
    ending = states | {"embedding and head": 2 * vocabulary * (2 * size + 4 - own)}
    whole = {"embedding and head": float(2 * vocabulary * size)}
    peaks = early | whole | in_head, early | whole | in_layer, ending
    return Plan(modes, max(peaks, key=lambda parts: sum(parts.values())))


def _at_work(layers: list[Layer], work: Work, begun: int) -> float:
    """Returns the peak bytes of recomputing a layer, the maximum over the first `begun` layers."""
    config, tokens = layers[0].self_attn.config, work.tokens
    window = tokens * work.cp
    attention = feed_forward = 0
    if work.cp > 1:
        # Keys, values and gradients of a part of the heads, and tensors in transfer; the window's latents, and their
        # gradient in float32.
        columns = 2 * config.qk_head_dim + 3 * config.v_head_dim + config.qk_nope_head_dim
        own = config.num_attention_heads // work.cp
        columns += 2 * (config.qk_head_dim + 2 * config.v_head_dim) * overlapped(own, window)
        heads = heads_at_once(own, window)
        latents = config.kv_lora_rank + config.qk_rope_head_dim
        attention = window * (heads * columns * work.size + latents * (work.size + 4))
    if any(tokens > AT_ONCE // _width(layer) for layer in layers):
        feed_forward = 4 * AT_ONCE * work.size
    return max((kept(layer, work, "none") for layer in layers[:begun]), default=0.0) + max(attention, feed_forward)


def plans(count: int) -> Iterator[tuple[str, ...]]:
    """Yields modes for `count` layers, the fastest first: none, selective in more and more layers, then full."""
    for number in range(count + 1):
        yield ("selective",) * number + ("none",) * (count - number)
    for number in range(1, count + 1):
        yield ("full",) * number + ("selective",) * (count - number)


def choose(model: Transformer, work: Work, budget: float) -> Plan:
    """Returns the fastest plan that needs at most `budget` bytes; the last one if none fits."""
    count = sum(isinstance(module, Layer) for module in model.modules())
    for modes in plans(count):
        found = plan(model, work, modes)
        if found.need <= budget:
            break
    return found
