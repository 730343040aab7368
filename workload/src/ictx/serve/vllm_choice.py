"""Chooses between vLLM's attention and ours by the request and the served model. Does not import vLLM."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ictx.errors import UserError
from ictx.kernels import dispatch
from ictx.kernels.layout import LATENT, ROPE

VARIABLE = "ICTX_VLLM_ATTENTION"
"""Environment variable with the choice: vllm (the default) or ictx."""
VLLM = "0.32"
"""Supported minor version of vLLM."""
MOST_HEADS, MOST_QUERIES = 128, 8
"""Maximum heads, and maximum new tokens per sequence and step, of `mla_decode`."""


@dataclass(frozen=True)
class Served:
    """The properties of the served model on which the choice depends."""

    device: str
    """cpu or cuda."""
    capability: int
    """Compute capability as one number, such as 90; 0 on a CPU."""
    dtype: torch.dtype
    """dtype of weights and activations."""
    cache_dtype: str
    """dtype of the cache, as named by vLLM: auto, float16, fp8, …"""
    block_size: int | None
    """Tokens per block of the cache if set by the user."""
    latent: int
    rope: int
    """Widths of the two parts of a cached token, in values."""
    heads: int
    """Heads per rank."""
    queries: int = 1
    """New tokens per sequence and step: more than 1 with speculative decoding."""
    backend: str | None = None
    """Back end that the user requested by name."""
    amx: bool = False
    """Whether vLLM would select its AMX back end on this CPU."""
    other: tuple[str, ...] = ()
    """Other required features that our attention lacks."""


def wanted() -> bool:
    """Returns whether our attention is requested. Raises UserError for another value of the variable."""
    value = os.environ.get(VARIABLE) or "vllm"
    if value not in ("ictx", "vllm"):
        raise UserError(f"{VARIABLE} is {value!r}: expected ictx or vllm")
    return value == "ictx"


def refused_version(version: str) -> str | None:
    """Returns why this version of vLLM is not supported, or None."""
    if version.split(".")[:2] == VLLM.split("."):
        return None
    return f"vLLM {version} is not supported: expected {VLLM}"


def refused(served: Served) -> str | None:
    """Returns why our decoding cannot replace vLLM's, or None."""
    if (served.latent, served.rope) != (LATENT, ROPE):
        return f"a cached token has {served.latent} + {served.rope} values, ours {LATENT} + {ROPE}"
    if served.heads > MOST_HEADS:
        return f"{served.heads} heads per rank exceed {MOST_HEADS}"
    if served.queries > MOST_QUERIES:
        return f"{served.queries} new tokens per sequence exceed {MOST_QUERIES}"
    if served.other:
        return served.other[0]
    own = str(served.dtype).removeprefix("torch.")
    if served.cache_dtype not in ("auto", own):
        # vLLM's fp8 cache has one scale per layer, ours one per 128 values.
        return f"the layout of a {served.cache_dtype} cache differs from ours: the cache must be {own}"
    if served.block_size is not None and (served.block_size < 16 or served.block_size & (served.block_size - 1)):
        return f"block size {served.block_size} is not 16, 32, 64 or another power of 2"
    if served.device not in ("cpu", "cuda"):
        return f"device {served.device} is neither a CPU nor an NVIDIA GPU"
    if served.amx and served.device == "cpu":
        return "vLLM uses its AMX back end on this CPU"
    if served.backend is not None and served.device == "cuda":
        return f"{served.backend} is requested by name"
    return _refused_by_kernels(served)


def _refused_by_kernels(served: Served) -> str | None:
    """Returns why `mla_decode` cannot run, or on a GPU would not run as a Triton kernel, or None."""
    try:
        choice = dispatch.choose("mla_decode", torch.device(served.device), served.dtype, cc=served.capability)
    except UserError as error:
        return str(error)
    return None if choice.name == "triton" or served.device == "cpu" else choice.reason


def prefills(served: Served, named: str | None) -> bool:
    """Returns whether our prefill replaces vLLM's: on CPUs with our decoding, on GPUs for which vLLM has none.

    Args:
        named: prefill back end requested by the user.
    """
    if served.device == "cpu":
        return refused(served) is None
    # Before Blackwell, vLLM has only FlashAttention, which requires Ampere.
    return served.device == "cuda" and 0 < served.capability < 80 and named is None
