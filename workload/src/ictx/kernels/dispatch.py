"""Selects the implementation of each operation from device, dtype and shape, and reports the reason."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from ictx.errors import UserError
from ictx.kernels import tuned

F = TypeVar("F", bound=Callable[..., Any])
VARIABLE = "ICTX_KERNELS"
"""Environment variable that forces an implementation: auto (default), triton, torch, or one of LIBRARIES."""
OPERATIONS = ("mla_attention", "mla_decode", "mla_prefill", "mla_rope_cache", "decode_products")
LIBRARIES = {"flash4": "FlashAttention 4", "cudnn": "cuDNN"}
"""Libraries that may replace our attention kernel in training."""
FLASH4 = "4.0.0b36"
"""Supported version of flash-attn-4. We call its private functions, which may change between alpha releases."""
OLDEST = 75
"""Lowest compute capability that Triton kernels are built for."""


EARLY = 90
"""Lowest compute capability with programmatic dependent launch: a kernel may begin before the previous one ends."""


FAST_TARGET = 90
"""Compute capability whose GPUs have either HBM3 or HBM3e."""
FAST_MEMORY = 100e9
"""Memory size in bytes above which such a GPU has HBM3e: H200, GH200 144 GB."""


standing_for: int | None = None
"""Compute capability assumed for every device during ahead-of-time compilation; None otherwise."""
standing_fast = False
"""Whether that GPU is assumed to have fast memory, for every cache (see `fast_memory`)."""


@dataclass(frozen=True)
class Choice:
    """An implementation and why it was chosen."""

    name: str
    reason: str


@functools.cache
def have_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability(device: torch.device) -> int:
    """Returns the compute capability as one number, such as 90, or 0 if the device is not an NVIDIA GPU."""
    if standing_for is not None:
        return standing_for
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def _total_memory(device: torch.device) -> int:
    """Returns the bytes of a GPU's memory."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def fast_memory(device: torch.device, stored: str | None = None) -> bool:
    """Whether a GPU reads a cache faster than its compute capability implies.

    An H200 reads 4.8 TB/s, an H100 3.35 TB/s. A quantised cache has half the bytes, so its tokens are read as fast on
    an H100.
    """
    if standing_for is not None:
        return standing_fast
    return capability(device) == FAST_TARGET and (stored is not None or _total_memory(device) > FAST_MEMORY)


def half(cc: int) -> torch.dtype:
    """Returns the 16-bit dtype that kernels are tuned and compiled for on a compute capability."""
    return torch.bfloat16 if cc >= 80 else torch.float16


def launches_early(device: torch.device) -> bool:
    """Whether kernels may begin before the previous launch ends (programmatic dependent launch)."""
    return capability(device) >= EARLY and not interpreted()


def launch_options(early: bool) -> dict[str, bool]:
    """Returns the compile-time parameter and the launch option for programmatic dependent launch."""
    return {"DEPENDENT": early} | ({"launch_pdl": True} if early else {})


def constant(function: F) -> F:
    """Makes a function's result a constant for torch.compile; it must not change while a process trains."""
    return cast(F, torch.compiler.assume_constant_result(function))  # type: ignore[no-untyped-call]


@constant
def choose(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    stored: str | None = None,
    cc: int | None = None,
    shape: str | None = None,
    equal: bool = False,
    flash4: bool = True,
) -> Choice:
    """Returns the implementation for an operation's inputs; `cc` replaces the device's compute capability.

    Args:
        shape: why the kernel does not support the inputs' shape; None if it does.
        equal: whether all documents have the same length.
        flash4: whether FlashAttention 4 supports the inputs' widths, and the document boundaries are available.

    Raises:
        UserError: the environment variable has an unknown value, or forces Triton where it cannot run.
    """
    forced = os.environ.get(VARIABLE, "auto")
    if forced not in ("auto", "triton", "torch", *LIBRARIES):
        raise UserError(f"{VARIABLE} is {forced!r}: expected auto, triton, torch, {' or '.join(LIBRARIES)}")
    if forced == "torch":
        return Choice("torch", f"{VARIABLE}=torch")
    cc = capability(device) if cc is None else cc
    passed: list[str] = []
    if operation == "mla_attention" and forced != "triton" and not shape:
        for name, reason in _libraries(cc, forced):
            if not (lacking := _lacking(name, dtype, cc, equal, flash4)):
                return Choice(name, "; ".join([reason, *passed]))
            passed.append(f"{LIBRARIES[name]} is not used: {lacking}")
    obstacle = shape or _obstacle(operation, device, dtype, stored, cc)
    if obstacle and forced == "triton":
        raise UserError(f"{VARIABLE}=triton, but {operation} cannot use Triton here: {obstacle}")
    if obstacle:
        return Choice("torch", "; ".join([obstacle, *passed]))
    where = "Triton's interpreter" if interpreted() else "the kernel supports this GPU"
    return Choice("triton", "; ".join([f"{VARIABLE}=triton" if forced == "triton" else where, *passed]))


def _libraries(cc: int, forced: str) -> list[tuple[str, str]]:
    """Returns the libraries that may compute attention on a compute capability, the fastest first, and the reasons."""
    if forced in LIBRARIES:
        return [(forced, f"{VARIABLE}={forced}")]
    measured = tuned.section("libraries")["mla_attention"].get(f"sm_{cc}", [])
    return [(entry["name"], f"fastest here: {entry['measured']}") for entry in measured]


def _lacking(library: str, dtype: torch.dtype, cc: int, equal: bool, flash4: bool) -> str | None:
    """Returns why a library cannot compute attention of a dtype on a compute capability, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it has no {str(dtype).removeprefix('torch.')}"
    if standing_for is not None or interpreted():
        return "ahead-of-time compilation and the interpreter use our kernels"
    if torch.are_deterministic_algorithms_enabled():
        return "its gradients are not deterministic"
    if library == "cudnn":
        if cc < 90:
            return f"compute capability {cc / 10} is below 9.0"
        return None if equal else "documents differ in length"
    if not flash4:
        return "unsupported head widths, or unknown document boundaries"
    if cc // 10 not in (9, 10):
        return f"compute capability {cc / 10} is neither 9 nor 10"
    found = flash4_version()
    return None if found == FLASH4 else f"flash-attn-4 {FLASH4} is not installed{f', but {found}' if found else ''}"


@functools.cache
def flash4_version() -> str | None:
    """Returns the installed version of FlashAttention 4, or None."""
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


def takes_edges(device: torch.device) -> bool:
    """Whether attention over packed documents may use a library that requires the first token of each document."""
    return device.type == "cuda" and _lacking("flash4", torch.bfloat16, capability(device), False, True) is None


def _obstacle(operation: str, device: torch.device, dtype: torch.dtype, stored: str | None, cc: int) -> str | None:
    """Returns why the Triton kernel cannot run, or None."""
    if not have_triton():
        return "Triton is not installed"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {str(dtype).removeprefix('torch.')} is neither float16 nor bfloat16"
    if interpreted():
        # It stores bfloat16 as 16-bit integers and multiplies those.
        return "Triton's interpreter supports only float16" if dtype != torch.float16 else None
    if device.type != "cuda" and not cc:
        return f"device {device.type} is not an NVIDIA GPU"
    return refused(operation, cc, dtype, stored)


def refused(operation: str, cc: int, dtype: torch.dtype, stored: str | None) -> str | None:
    """Returns why an operation has no Triton kernel for a compute capability and dtypes, or None."""
    if cc < OLDEST:
        return f"compute capability {cc / 10} is below {OLDEST / 10}"
    if dtype == torch.bfloat16 and cc < 80:
        return f"compute capability {cc / 10} has no bfloat16"
    if stored == "fp8" and cc < 89 and operation == "mla_decode":
        return f"compute capability {cc / 10} has no fp8"
    return None


def explain(device: torch.device, dtype: torch.dtype, cc: int | None = None) -> list[tuple[str, str, Choice]]:
    """Returns (operation, cache, choice) for every operation and cache dtype; `equal`: documents of equal length."""
    rows = []
    for operation in OPERATIONS:
        for stored in (None, "int8", "fp8") if operation == "mla_decode" else (None,):
            rows.append((operation, stored or "16-bit", choose(operation, device, dtype, stored=stored, cc=cc)))
        if operation == "mla_attention":
            rows.append((operation, "equal", choose(operation, device, dtype, cc=cc, equal=True)))
    return rows
