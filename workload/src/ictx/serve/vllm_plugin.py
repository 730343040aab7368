"""What vLLM loads at the start of each of its processes (entry point `vllm.general_plugins`).

With `ICTX_VLLM_ATTENTION=ictx` it registers our attention for the places that vLLM's own takes. Whether ours is taken
is decided there when a model is loaded, and logged in one line.
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
"""Back ends of vLLM for latent attention. Ours takes the place of the one that vLLM looks at first; at the others, only
what the user requests by name is seen."""
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
        logger.warning("%s=ictx: vLLM's own attention stays: %s", VARIABLE, reason)
        return
    from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum, register_mla_prefill_backend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    for name in DECODE:
        register_backend(AttentionBackendEnum[name], f"{SLOTS}.{name}")
    for name in PREFILL:
        register_mla_prefill_backend(MLAPrefillBackendEnum[name], f"{SLOTS}.PREFILL_{name}")
