"""Our attention as vLLM's back ends. vLLM imports this module by the names that `vllm_plugin` registered.

A name is resolved when vLLM selects a back end for a model, to our class or to vLLM's class of that name, depending on
the model's configuration.
"""

from __future__ import annotations

import functools
from itertools import accumulate
from typing import Any, ClassVar

import torch
import vllm.envs
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.platforms import CpuArchEnum, current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType, MultipleOf
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl
from vllm.v1.attention.backends.mla.prefill.base import MLAPrefillBackend
from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ictx.kernels.decode.op import mla_decode
from ictx.kernels.layout import ROW
from ictx.serve.ragged import attend_ragged
from ictx.serve.vllm_choice import VARIABLE, Served, prefills, refused

logger = init_logger("vllm.ictx")


@functools.cache
def _ran(what: str) -> None:
    """Logs once per process what is computed by our code."""
    logger.info("ictx computes %s", what)


class _Decode:
    """Decoding by `mla_decode`; a mixin for implementations of vLLM."""

    scale: float

    def forward_mqa(
        self, q: Tensor | tuple[Tensor, Tensor], kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns attended latents [tokens, heads, 512] and their log-sum-exp [tokens, heads].

        Args:
            q: absorbed queries [tokens, heads, 576], or their two parts; each sequence has equally many tokens.
            kv_c_and_k_pe_cache: [blocks, block_size, 576].
        """
        if isinstance(q, tuple):
            q = torch.cat(q, -1)
        cache, decode = kv_c_and_k_pe_cache, attn_metadata.decode
        lens, table = decode.seq_lens.to(torch.int32), decode.block_table.to(torch.int32)
        tokens, heads, width = q.shape
        _ran(f"decoding: mla_decode, {heads} heads, blocks of {cache.shape[1]}, {q.dtype} on {q.device.type}")
        q_bqhd = q.view(len(lens), tokens // len(lens), heads, width)
        out, lse = mla_decode(q_bqhd, cache, lens, self.scale, table)
        return out.flatten(0, 1), lse.flatten(0, 1)


class CpuImpl(_Decode, CPUMLAImpl):
    """vLLM's implementation for CPUs with our decoding."""


class CpuBackend(CPUMLABackend):
    """Back end for CPUs with our decoding."""

    @staticmethod
    def get_impl_cls() -> type[CpuImpl]:
        """Returns the implementation."""
        return CpuImpl


class CudaImpl(_Decode, MLACommonImpl[MLACommonMetadata]):
    """vLLM's common implementation for GPUs, with our decoding."""

    can_return_lse_for_decode = True

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args: Any,
    ) -> None:
        if alibi_slopes or sliding_window or logits_soft_cap or attn_type != AttentionType.DECODER:
            raise NotImplementedError("ictx's attention has no slopes, windows, caps or encoders")
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **mla_args,
        )


class CudaBuilder(MLACommonMetadataBuilder[MLACommonMetadata]):
    """The kernel's grid does not depend on lengths, so that whole steps can be captured as CUDA graphs."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.UNIFORM


class CudaBackend(MLACommonBackend):
    """Back end for GPUs: our decoding with vLLM's prefill."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """Returns the name for vLLM's log."""
        return "ICTX_MLA"

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Returns the widths of a cached token."""
        return [ROW]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Returns the tokens per block. vLLM divides larger blocks into these."""
        return [16, 64]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Returns the default tokens per block: with 16, `mla_decode` takes a third longer (H200)."""
        return max(default_block_size, 64)

    @staticmethod
    def get_impl_cls() -> type[CudaImpl]:
        """Returns the implementation."""
        return CudaImpl

    @staticmethod
    def get_builder_cls() -> type[CudaBuilder]:
        """Returns the builder of a batch's metadata."""
        return CudaBuilder


class Prefill(MLAPrefillBackend):
    """Attention of new tokens: PyTorch on CPUs, our kernel on GPUs that FlashAttention does not support."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        """Returns the name for vLLM's log."""
        return "ICTX"

    def prepare_metadata(self, prefill_metadata: Any) -> None:
        """Reads the bounds of the batch's sequences, once for all layers."""
        super().prepare_metadata(prefill_metadata)
        self._bounds = list(accumulate(prefill_metadata.query_lens_cpu.tolist(), initial=0))

    def run_prefill_new_tokens(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        return_softmax_lse: bool,
        out: Tensor | None = None,
        output_scale: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns causal attention among new tokens [tokens, heads, value], and its log-sum-exp [heads, tokens]."""
        assert output_scale is None and out is None, "vLLM passes these where supports_out or _quant_output is true"
        _ran(f"prefill: {q.shape[1]} heads, {q.dtype} on {q.device.type}")
        result, lse = attend_ragged(q, k, v, self._bounds, self._bounds, self.scale, causal=True)
        return (result, lse) if return_softmax_lse else result

    def run_prefill_context_chunk(
        self, chunk: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns attention of new tokens to a part of the cached ones, and its log-sum-exp."""
        assert out is None, "vLLM passes it where supports_out is true"
        bounds = (chunk.query_start_loc.tolist(), chunk.cu_seq_lens.tolist())
        return attend_ragged(q, k, v, *bounds, self.scale, causal=False)


def served(config: Any) -> Served:
    """Returns the requirements on attention of a configuration of vLLM."""
    model, cache, parallel, speculative = (
        config.model_config,
        config.cache_config,
        config.parallel_config,
        config.speculative_config,
    )
    text, capability = model.hf_text_config, current_platform.get_device_capability()
    backend = config.attention_config.backend
    other = {
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "sparse attention": hasattr(text, "index_topk"),
        "attention to later tokens": config.attention_config.use_non_causal,
        "batch invariance": bool(vllm.envs.VLLM_BATCH_INVARIANT),
        "adaptive verification": speculative is not None and speculative.enable_adaptive_verification,
    }
    return Served(
        device=current_platform.device_type,
        capability=capability.to_int() if capability is not None and current_platform.is_cuda() else 0,
        dtype=model.dtype,
        cache_dtype=cache.cache_dtype,
        block_size=cache.block_size if cache.user_specified_block_size else None,
        latent=getattr(text, "kv_lora_rank", 0) or 0,
        rope=getattr(text, "qk_rope_head_dim", 0) or 0,
        heads=model.get_num_attention_heads(parallel),
        queries=1 + (speculative.num_speculative_tokens if speculative is not None else 0),
        backend=backend.name if backend is not None else None,
        amx=_amx(backend),
        other=tuple(f"{name} is requested" for name, asked in other.items() if asked),
    )


def _amx(backend: AttentionBackendEnum | None) -> bool:
    """Whether vLLM would select its AMX back end, by the conditions of its CPU platform."""
    return (
        current_platform.get_cpu_architecture() == CpuArchEnum.X86
        and torch.cpu._is_amx_tile_supported()
        and backend != AttentionBackendEnum.CPU_MLA
    )


def _leads(slot: str, what: Served) -> bool:
    """Whether this back end is the first of vLLM's list for the device."""
    if what.device == "cpu":
        return slot == ("AMX_MLA" if what.amx else "CPU_MLA")
    return slot == {10: "FLASHINFER_MLA", 12: "TRITON_MLA"}.get(what.capability // 10, "FLASH_ATTN_MLA")


def _decode_slot(slot: str) -> Any:
    """Returns the class of a registered name."""
    config = get_current_vllm_config_or_none()
    if config is not None and config.model_config is not None:
        what = served(config)
        # On CPUs vLLM ignores a requested name.
        first = _leads(slot, what) and (what.backend is None or what.device == "cpu")
        if first or slot == what.backend:
            reason = refused(what)
            if reason is None:
                logger.info_once("%s=ictx: our attention replaces %s", VARIABLE, slot)
                return CpuBackend if what.device == "cpu" else CudaBackend
            logger.warning_once("%s=ictx: vLLM's own attention is used: %s", VARIABLE, reason)
    return resolve_obj_by_qualname(AttentionBackendEnum[slot].value)


def _prefill_slot(slot: str) -> Any:
    """Returns the class of a registered name."""
    config = get_current_vllm_config_or_none()
    if config is not None and config.model_config is not None:
        named = config.attention_config.mla_prefill_backend
        if prefills(served(config), named.name if named is not None else None):
            return Prefill
    return resolve_obj_by_qualname(MLAPrefillBackendEnum[slot].value)


def __getattr__(name: str) -> Any:
    """Resolves a registered name."""
    if name.startswith("PREFILL_") and name.removeprefix("PREFILL_") in MLAPrefillBackendEnum.__members__:
        return _prefill_slot(name.removeprefix("PREFILL_"))
    if name in AttentionBackendEnum.__members__:
        return _decode_slot(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
