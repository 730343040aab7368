"""The plug-in that vLLM loads in each of its processes (entry point `vllm.general_plugins`).

With `ICTX_VLLM_ATTENTION=ictx` it registers our attention under the names of vLLM's back ends. Which one is used is
decided when a model is loaded, and logged in one line.
"""

from __future__ import annotations

from ictx.serve.vllm_choice import VARIABLE, refused_version, wanted

SLOTS = "ictx.serve.vllm_attention"
DECODE = (
    "AMX_MLA",
    "CPU_MLA",
    "CUTLASS_MLA",
    "FLASHINFER_MLA",
    "FLASHMLA",
    "FLASH_ATTN_MLA",
    "TOKENSPEED_MLA",
    "TRITON_MLA",
)
"""vLLM's back ends for latent attention. Ours replaces the first one of vLLM's list for the device; the others are only
registered so that a request by name is noticed."""
PREFILL = ("CPU", "FLASH_ATTN")


def register() -> None:
    """Registers our attention where it is requested; idempotent. Raises UserError for a wrong value."""
    if not wanted():
        return
    import vllm
    from vllm.logger import init_logger

    logger = init_logger("vllm.ictx")
    reason = refused_version(vllm.__version__)
    if reason is not None:
        logger.warning("%s=ictx: vLLM's own attention is used: %s", VARIABLE, reason)
        return
    from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum, register_mla_prefill_backend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name in DECODE:
        register_backend(AttentionBackendEnum[name], f"{SLOTS}.{name}")
    for name in PREFILL:
        register_mla_prefill_backend(MLAPrefillBackendEnum[name], f"{SLOTS}.PREFILL_{name}")
