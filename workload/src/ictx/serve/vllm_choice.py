"""Whether our attention takes vLLM's place, from what was requested and what is served. Imports nothing of vLLM."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ictx.errors import UserError
from ictx.kernels import dispatch
from ictx.kernels.layout import LATENT, ROPE

VARIABLE = "ICTX_VLLM_ATTENTION"
"""Environment variable that chooses: vllm (the default) or ictx."""
VLLM = "0.32"
"""Versions of vLLM that the back ends are written for."""
MOST_HEADS, MOST_QUERIES = 128, 8
"""Heads, and new tokens of a sequence at once, that `mla_decode` takes."""


@dataclass(frozen=True)
class Served:
    """What vLLM serves, as far as the choice depends on it."""

    device: str
    """cpu or cuda."""
    capability: int
    """Compute capability as one number, such as 90; 0 on a CPU."""
    dtype: torch.dtype
    """Of weights and activations."""
    cache_dtype: str
    """As vLLM names it: auto, float16, fp8, …"""
    block_size: int | None
    """Tokens of a block of the cache, as the user requested."""
    latent: int
    rope: int
    """Widths of the two parts of a cached token."""
    heads: int
    """Of one rank."""
    queries: int = 1
    """New tokens of a sequence at once: more than 1 with speculative decoding."""
    backend: str | None = None
    """Back end that the user requested by name."""
    amx: bool = False
    """Whether vLLM would, without a GPU, take its back end for processors with AMX."""
    other: tuple[str, ...] = ()
    """What else is required of attention that ours does not have, in words."""


def wanted() -> bool:
    """Returns whether our attention is requested. Raises UserError when the variable has no such value."""
    value = os.environ.get(VARIABLE) or "vllm"
    if value not in ("ictx", "vllm"):
        raise UserError(f"{VARIABLE} is {value!r}: expected ictx or vllm")
    return value == "ictx"


def refused_version(version: str) -> str | None:
    """Returns why the back ends cannot be registered with this version of vLLM, or None."""
    if version.split(".")[:2] == VLLM.split("."):
        return None
    return f"this is vLLM {version}, and the back ends are written for {VLLM}"


def refused(served: Served) -> str | None:
    """Returns why our decoding cannot take the place of vLLM's, or None."""
    if (served.latent, served.rope) != (LATENT, ROPE):
        return f"a cached token has {served.latent} + {served.rope} values, and ours {LATENT} + {ROPE}"
    if served.heads > MOST_HEADS:
        return f"{served.heads} heads are more than {MOST_HEADS}"
    if served.queries > MOST_QUERIES:
        return f"{served.queries} tokens of a sequence at once are more than {MOST_QUERIES}"
    if served.other:
        return served.other[0]
    own = str(served.dtype).removeprefix("torch.")
    if served.cache_dtype not in ("auto", own):
        # vLLM's fp8 has one scale for all of a layer's cache, ours one for 128 values.
        return f"the layout of a {served.cache_dtype} cache differs from ours: the cache must be {own}"
    if served.block_size is not None and (served.block_size < 16 or served.block_size & (served.block_size - 1)):
        return f"block size {served.block_size} is not 16, 32, 64 or another power of 2"
    if served.device not in ("cpu", "cuda"):
        return f"device {served.device} is neither a CPU nor an NVIDIA GPU"
    if served.amx and served.device == "cpu":
        return "vLLM has its own for processors with AMX"
    if served.backend is not None and served.device == "cuda":
        return f"{served.backend} is requested by name"
    return _refused_by_kernels(served)


def _refused_by_kernels(served: Served) -> str | None:
    """Returns why `mla_decode` cannot run, or would not as a Triton kernel on a GPU, or None."""
    try:
        choice = dispatch.choose("mla_decode", torch.device(served.device), served.dtype, cc=served.capability)
    except UserError as error:
        return str(error)
    return None if choice.name == "triton" or served.device == "cpu" else choice.reason


def prefills(served: Served, named: str | None) -> bool:
    """Returns whether our prefill takes vLLM's place: on a CPU with our decoding, on GPUs where vLLM has none.

    Args:
        named: prefill back end that the user requested.
    """
    if served.device == "cpu":
        return refused(served) is None
    # FlashAttention, all that vLLM has before Blackwell, begins with Ampere.
    return served.device == "cuda" and 0 < served.capability < 80 and named is None
