"""A decode step that runs entirely on the device, for capture in a CUDA graph, at any context length.

Lengths, positions and tokens are on the device. Steps need no data from the host and no shape changes, so that one
captured graph decodes every token up to the cache's capacity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from ictx.errors import UserError
from ictx.infer.cache import LatentCache
from ictx.kernels import dispatch, layout
from ictx.kernels.decode.op import MOST_HEADS, Workspace, mla_decode
from ictx.kernels.next_token.op import Places, begin, choose_likeliest
from ictx.kernels.products.op import OPERATION, NewRow, absorb, expand, project
from ictx.model.cache import quantisable
from ictx.model.config import LATENT_NORM_EPS, ModelConfig
from ictx.model.moe import FeedForward
from ictx.model.rope import rotations
from ictx.model.transformer import Layer, Transformer


def unfit(config: ModelConfig) -> str | None:
    """Returns why a model does not support this step, or None."""
    if config.num_attention_heads > MOST_HEADS:
        return f"{config.num_attention_heads} heads: expected at most {MOST_HEADS}"
    if not quantisable(config):
        return (
            f"latents of {config.kv_lora_rank} and keys of {config.qk_rope_head_dim} values: "
            f"expected {layout.LATENT} and {layout.ROPE}"
        )
    if config.moe:
        return "experts: the host needs the number of tokens of each"
    return None


def uncaptured(model: Transformer, cache: LatentCache) -> str | None:
    """Returns why the step cannot be captured, or None; requires a GPU that all kernels support, one 16-bit dtype."""
    weight = model.lm_head.weight
    if reason := unfit(model.config):
        return reason
    if weight.device.type != "cuda":
        return f"device {weight.device.type} has no CUDA graphs"
    if cache.dtype != weight.dtype:
        return f"the cache is {cache.dtype}, the weights are {weight.dtype}"
    if cache.direct is None:
        return f"blocks of {cache.block_size} tokens: expected a power of 2"
    for operation in ("mla_decode", "mla_rope_cache", OPERATION):
        choice = dispatch.choose(operation, weight.device, weight.dtype, stored=cache.stored)
        if choice.name != "triton":
            return f"{operation}: {choice.reason}"
    return None


class DecodeStep:
    """Greedy decoding of `tokens` more tokens of every sequence in a cache, one per call."""

    token_b: Tensor
    """The newest token of each sequence, int64 [batch], which is not in the cache yet; a call replaces it."""
    lengths_b: Tensor
    """Cached tokens of each sequence, int32 [batch]; a call increments it."""
    logits: Tensor
    """Result of a replay of the captured graph, [batch, vocabulary]."""

    def __init__(self, model: Transformer, cache: LatentCache, token_b: Tensor, tokens: int) -> None:
        """Reserves slots in the cache for the tokens, and makes the weights of a layer's first projections contiguous.

        Raises UserError if the model does not support the step, or the cache is too small.
        """
        if reason := unfit(model.config):
            raise UserError(f"no captured decode step for this model: {reason}")
        self.model, self.cache, self.config = model, cache, model.config
        weight = model.lm_head.weight
        if cache.dtype != weight.dtype:
            raise UserError(f"the cache is {cache.dtype}, the weights are {weight.dtype}: expected the same dtype")
        self.token_b = token_b.clone()
        self.lengths_b = cache.lengths.to(torch.int32)
        self._slots = cache.reserve(tokens)
        self.places = self._places()
        self.table = None if cache.direct else cache.block_tables
        self.workspace: Workspace | None = None
        if weight.device.type == "cuda":
            # Shared by all layers, which run sequentially.
            self.workspace = Workspace.of(
                weight.device, cache.batch, self.config.num_attention_heads, cache.dtype, cache.stored
            )
        self.first = [self._join_first(cast(Layer, layer)) for layer in model.model.layers]

    def _places(self) -> Places:
        """Returns the reserved tokens' positions and slots."""
        positions_bs = self._slots.positions_bs
        rope = rotations(self.config, positions_bs)
        shape = *positions_bs.shape, -1
        return Places(
            positions_bs[:, 0].to(torch.int32).contiguous(),
            rope.cos.reshape(shape).contiguous(),
            rope.sin.reshape(shape).contiguous(),
            self.cache.places(positions_bs).contiguous(),
        )

    def _join_first(self, layer: Layer) -> Tensor:
        """Returns the stacked weights of the projections with the same input; the modules get views of them."""
        attention = layer.self_attn
        query = attention.q_proj if self.config.q_lora_rank is None else attention.q_a_proj
        both = (query, attention.kv_a_proj_with_mqa)
        joined = torch.cat([linear.weight.detach() for linear in both])
        for linear, part in zip(both, torch.split(joined, [linear.out_features for linear in both]), strict=True):
            linear.weight.data = part
        return joined

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Adds `token_b` to the cache; returns the logits [batch, vocabulary], whose argmax becomes `token_b`."""
        config, model = self.config, self.model
        embedding = model.model.embed_tokens.weight
        x_bd, cos, sin, slots_b = begin(self.token_b, self.lengths_b, embedding, self.places)
        for number, layer in enumerate(model.model.layers):
            x_bd = self._layer(cast(Layer, layer), number, x_bd, cos, sin, slots_b)
        logits = project(x_bd, model.lm_head.weight, gain=model.model.norm.weight, eps=config.rms_norm_eps)
        choose_likeliest(logits, self.token_b)
        return logits

    def _layer(self, layer: Layer, number: int, x_bd: Tensor, cos: Tensor, sin: Tensor, slots_b: Tensor) -> Tensor:
        """Returns the residual stream after a layer."""
        config, attention, feed = self.config, layer.self_attn, cast(FeedForward, layer.mlp)
        eps, heads, entries = config.rms_norm_eps, config.num_attention_heads, self.cache.layers[number]
        first = project(x_bd, self.first[number], gain=layer.input_layernorm.weight, eps=eps)
        q, latent = first[:, : -config.cache_width], first[:, -config.cache_width :]
        if config.q_lora_rank is not None:
            q = project(q, attention.q_b_proj.weight, gain=attention.q_a_layernorm.weight, eps=LATENT_NORM_EPS)
        gain, w_kv = attention.kv_a_layernorm.weight, attention.kv_b_proj.weight.view(heads, -1, config.kv_lora_rank)
        new = NewRow(latent, gain, slots_b, entries, LATENT_NORM_EPS, self.cache.stored)
        q_c = absorb(q.reshape(len(q), heads, -1), w_kv, cos, sin, new)
        out, _ = mla_decode(
            q_c, entries, self.lengths_b, config.softmax_scale, self.table, self.cache.stored, workspace=self.workspace
        )
        x_bd = project(expand(out, w_kv, config.v_head_dim), attention.o_proj.weight, residual=x_bd)
        gain = layer.post_attention_layernorm.weight
        hidden = project(x_bd, feed.gate_proj.weight, gain=gain, eps=eps, up=feed.up_proj.weight)
        return project(hidden, feed.down_proj.weight, residual=x_bd)

    def capture(self) -> torch.cuda.CUDAGraph:
        """Returns a graph whose replay is equivalent to a call; restores tokens and lengths afterwards."""
        token_b, lengths_b = self.token_b.clone(), self.lengths_b.clone()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Compile missing kernels first, which is not allowed during a capture.
            self()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.logits = self()
        self.token_b.copy_(token_b)
        self.lengths_b.copy_(lengths_b)
        return graph

    def follow(self, run: Callable[[], object], count: int) -> Iterator[list[int]]:
        """Runs `count` steps with `run`, a call or a graph's replay; yields the tokens of each, one per sequence.

        On a GPU a step is launched before the previous step's tokens are read, so that it does not wait for the host.
        """
        if self.token_b.device.type != "cuda":
            for _ in range(count):
                run()
                yield self.token_b.tolist()
            return
        copies = [torch.empty_like(self.token_b, device="cpu").pin_memory() for _ in range(2)]
        copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        for number in range(count + 1):
            if number < count:
                run()
                copies[number % 2].copy_(self.token_b, non_blocking=True)
                copied[number % 2].record()
            if number:
                copied[(number - 1) % 2].synchronize()
                yield copies[(number - 1) % 2].tolist()

    def finish(self) -> None:
        """Adds the reserved tokens to the cache's lengths, once all have been decoded."""
        self.cache.commit(self._slots)
