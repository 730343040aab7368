"""Other implementations of decode over the latent cache, on the same inputs, called as their authors do.

Each function takes a case's inputs and returns a call for one set of them, whose result reshapes to
[batch, heads, 512]. It raises ImportError if its library is not installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ictx.kernels.bench.inputs import Inputs
from ictx.kernels.layout import LATENT, ROPE, ROW

Call = Callable[[int], Tensor]
WORKSPACE = 128 << 20
"""Bytes that FlashInfer requires."""
SGLANG_PARTS = 8
"""Parts of a sequence: the default of SGLang's `--triton-attention-num-kv-splits`."""


def eager(given: Inputs, scale: float) -> Call:
    """Absorbed attention in plain PyTorch, on contiguous rows."""

    def call(at: int) -> Tensor:
        q, rows = given.queries[at][:, 0], _rows(given, at)
        score = torch.einsum("bhd,btd->bht", q, rows) * scale
        return torch.einsum("bht,btd->bhd", score.softmax(-1), rows[..., :LATENT])

    return call


def sdpa(given: Inputs, scale: float) -> Call:
    """PyTorch's own attention; the value is the whole row, of which the latent is kept."""

    def call(at: int) -> Tensor:
        # Heads are passed as queries of one head: faster than rows repeated for each head.
        q, rows = given.queries[at], _rows(given, at)[:, None]
        return F.scaled_dot_product_attention(q, rows, rows, scale=scale)[..., :LATENT]

    return call


def flex(given: Inputs, scale: float) -> Call:
    """FlexAttention, compiled; all heads share the rows."""
    compiled = _compiled_flex()

    def call(at: int) -> Tensor:
        rows = _rows(given, at)[:, None]
        result: Tensor = compiled(given.queries[at].transpose(1, 2), rows, rows[..., :LATENT], scale)
        return result

    return call


@functools.cache
def _compiled_flex() -> Any:
    """Compiled per shape, in a separate function: torch.compile limits the recompilations of each function."""
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
        return flex_attention(q, k, v, scale=scale, enable_gqa=True)

    return torch.compile(attend, dynamic=False)


def vllm_triton(given: Inputs, scale: float) -> Call:
    """vLLM's Triton MLA, cut into as many parts as vLLM chooses."""
    from vllm.v1.attention.backends.mla.triton_mla import _compute_num_kv_splits
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    batch, _, heads, _ = given.queries[0].shape
    processors = torch.cuda.get_device_properties().multi_processor_count
    splits = _compute_num_kv_splits(given.context, processors)
    parts = torch.empty(batch, heads, splits, LATENT + 1, dtype=torch.float32, device="cuda")
    lse = torch.empty(batch, heads, dtype=given.queries[0].dtype, device="cuda")
    # Scales of an fp8 cache. vLLM's defaults are copied from the host, which is not allowed during a capture.
    one = torch.ones((), dtype=torch.float32, device="cuda")

    def call(at: int) -> Tensor:
        q, cache = given.queries[at][:, 0], given.plain[at][:, :, None]
        out = torch.empty(batch, heads, LATENT, dtype=q.dtype, device="cuda")
        decode_attention_fwd(
            q, cache, cache[..., :LATENT], out, lse, given.table, given.lens, parts, splits, scale, cache.shape[1],
            k_scale=one, v_scale=one, is_mla=True,
        )  # fmt: skip
        return out

    return call


def sglang_triton(given: Inputs, scale: float) -> Call:
    """SGLang's Triton decode, over pages of one token and cut into SGLang's default number of parts."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    batch, _, heads, _ = given.queries[0].shape
    tokens = torch.arange(batch * given.context, dtype=torch.int32, device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * given.context
    parts = torch.empty(batch, heads, SGLANG_PARTS, LATENT, dtype=torch.float32, device="cuda")
    lse = torch.empty(batch, heads, SGLANG_PARTS, dtype=torch.float32, device="cuda")
    counts = torch.full((batch,), SGLANG_PARTS, dtype=torch.int32, device="cuda")

    def call(at: int) -> Tensor:
        q, rows = given.queries[at][:, 0], given.plain[at].view(-1, 1, ROW)
        out = torch.empty(batch, heads, LATENT, dtype=q.dtype, device="cuda")
        decode_attention_fwd(
            q, rows, rows[..., :LATENT], out, starts, tokens, parts, lse, counts, SGLANG_PARTS, scale, 1.0, 1.0,
            has_mla=True,
        )  # fmt: skip
        return out

    return call


def flash_mla(given: Inputs, scale: float) -> Call:
    """FlashMLA: its own package, or the one in vLLM."""
    try:
        from flash_mla import flash_mla_with_kvcache, get_mla_metadata
    except ImportError:
        from vllm.third_party.flashmla.flash_mla_interface import flash_mla_with_kvcache, get_mla_metadata

    schedule, splits = get_mla_metadata(given.lens, given.queries[0].shape[2], 1)

    def call(at: int) -> Tensor:
        result: Tensor = flash_mla_with_kvcache(
            given.queries[at], given.plain[at][:, :, None], given.table, given.lens, LATENT, schedule, splits, scale
        )[0]
        return result

    return call


def flashinfer(given: Inputs, scale: float) -> Call:
    """FlashInfer's MLA over pages, planned once."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    batch, _, heads, _ = given.queries[0].shape
    blocks, page = given.table.shape[1], given.plain[0].shape[1]
    ends = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    plan = BatchMLAPagedAttentionWrapper(torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda"))
    dtype = given.queries[0].dtype
    plan.plan(
        ends, ends * blocks, given.table.flatten(), given.lens, heads, LATENT, ROPE, page, False, scale, dtype, dtype
    )

    def call(at: int) -> Tensor:
        q, cache = given.queries[at][:, 0], given.plain[at]
        result: Tensor = plan.run(q[..., :LATENT], q[..., LATENT:], cache[..., :LATENT], cache[..., LATENT:])
        return result

    return call


def flash_attention(given: Inputs, scale: float) -> Call:
    """FlashAttention 3, which takes absorbed and rotary queries separately; FlashAttention 2 is limited to width 256.

    Its own package, or the one in vLLM.
    """
    try:
        from flash_attn_interface import flash_attn_with_kvcache
    except ImportError:
        return _vllm_flash_attention(given, scale)

    def call(at: int) -> Tensor:
        q, cache = given.queries[at], given.plain[at][:, :, None]
        result: Tensor = flash_attn_with_kvcache(
            q[..., LATENT:].contiguous(), cache[..., LATENT:], cache[..., :LATENT], qv=q[..., :LATENT].contiguous(),
            cache_seqlens=given.lens, page_table=given.table, softmax_scale=scale,
        )  # fmt: skip
        return result

    return call


def _vllm_flash_attention(given: Inputs, scale: float) -> Call:
    """FlashAttention 3 as vLLM builds and calls it."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    starts = torch.arange(len(given.lens) + 1, dtype=torch.int32, device="cuda")

    def call(at: int) -> Tensor:
        q, cache = given.queries[at][:, 0], given.plain[at][:, :, None]
        result: Tensor = flash_attn_varlen_func(
            q[..., LATENT:], cache[..., LATENT:], cache[..., :LATENT], 1, starts, given.context, seqused_k=given.lens,
            q_v=q[..., :LATENT], softmax_scale=scale, causal=True, block_table=given.table, fa_version=3,
        )  # fmt: skip
        return result

    return call


PEERS: dict[str, Callable[[Inputs, float], Call]] = {
    "eager": eager,
    "sdpa": sdpa,
    "flex": flex,
    "vllm triton mla": vllm_triton,
    "sglang triton": sglang_triton,
    "flashmla": flash_mla,
    "flashinfer": flashinfer,
    "flashattention 3": flash_attention,
}


def _rows(given: Inputs, at: int) -> Tensor:
    """Returns the rows of each sequence, [batch, context, 576]; a case's blocks follow one another."""
    return given.plain[at].view(len(given.lens), given.context, ROW)
