"""Which implementation runs: decided in one place from device, dtype and shape; the reason is available on request."""

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
"""Environment variable that forces an implementation: auto (the default), triton, torch, or a library where it can."""
OPERATIONS = ("mla_attention", "mla_decode", "mla_prefill", "mla_rope_cache", "decode_products")
LIBRARIES = {"flash4": "FlashAttention 4", "cudnn": "cuDNN"}
"""What may attend in training in place of our kernel."""
FLASH4 = "4.0.0b36"
"""Version of flash-attn-4 that is called: others of this alpha may differ in what is not public."""
OLDEST = 75
"""Lowest compute capability that Triton kernels are built for."""


EARLY = 90
"""Lowest compute capability at which a launch may begin before the one before it has ended."""


FAST_TARGET = 90
"""Compute capability of cards with memory of two kinds."""
FAST_MEMORY = 100e9
"""Bytes of memory that only those of these cards exceed whose memory is HBM3e: H200, GH200 144 GB."""


standing_for: int | None = None
"""Compute capability that every device passes for, while kernels are compiled for a GPU that is not here."""
standing_fast = False
"""Whether such a GPU passes for one of fast memory, for every cache (see `fast_memory`)."""


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
    """Returns the compute capability as one number, such as 90, or 0 where the device is no NVIDIA GPU."""
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
    """Whether a GPU's memory delivers a cache faster than its compute capability implies.

    An H200 reads 4.8 TB/s, an H100 3.35; a quantised cache has half the bytes, so on an H100 its tokens come as fast.
    """
    if standing_for is not None:
        return standing_fast
    return capability(device) == FAST_TARGET and (stored is not None or _total_memory(device) > FAST_MEMORY)


def half(cc: int) -> torch.dtype:
    """Returns the 16-bit dtype that is measured and compiled for on a GPU of a compute capability."""
    return torch.bfloat16 if cc >= 80 else torch.float16


def launches_early(device: torch.device) -> bool:
    """Whether kernels may begin before the launch before them has ended (programmatic dependent launch)."""
    return capability(device) >= EARLY and not interpreted()


def launch_options(early: bool) -> dict[str, bool]:
    """Returns the compile-time parameter and the launch option of such kernels."""
    return {"DEPENDENT": early} | ({"launch_pdl": True} if early else {})


def constant(function: F) -> F:
    """Makes a function's result a constant for torch.compile: for what does not change while a process trains."""
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
        shape: what the kernel cannot do with the inputs' shape.
        equal: whether all documents are equally long.
        flash4: whether FlashAttention 4 has the inputs' widths, and gets the boundaries of their documents.

    Raises:
        UserError: the environment variable has no such value, or forces Triton where it cannot run.
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
            passed.append(f"{LIBRARIES[name]} is not taken: {lacking}")
    obstacle = shape or _obstacle(operation, device, dtype, stored, cc)
    if obstacle and forced == "triton":
        raise UserError(f"{VARIABLE}=triton, but {operation} cannot use Triton here: {obstacle}")
    if obstacle:
        return Choice("torch", "; ".join([obstacle, *passed]))
    where = "Triton's interpreter" if interpreted() else "a GPU that the kernel is built for"
    return Choice("triton", "; ".join([f"{VARIABLE}=triton" if forced == "triton" else where, *passed]))


def _libraries(cc: int, forced: str) -> list[tuple[str, str]]:
    """Returns the libraries that may attend on a compute capability, the fastest first, and why."""
    if forced in LIBRARIES:
        return [(forced, f"{VARIABLE}={forced}")]
    measured = tuned.section("libraries")["mla_attention"].get(f"sm_{cc}", [])
    return [(entry["name"], f"fastest here: {entry['measured']}") for entry in measured]


def _lacking(library: str, dtype: torch.dtype, cc: int, equal: bool, flash4: bool) -> str | None:
    """Returns what a library lacks for attention of a dtype on a compute capability, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it has no {str(dtype).removeprefix('torch.')}"
    if standing_for is not None or interpreted():
        return "our kernels are wanted"
    if torch.are_deterministic_algorithms_enabled():
        return "its gradients differ from run to run"
    if library == "cudnn":
        if cc < 90:
            return f"compute capability {cc / 10} is below 9.0"
        return None if equal else "documents of several lengths"
    if not flash4:
        return "other widths, or documents whose edges are not known"
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
    """Whether packed documents may be attended to by a library that gets the beginning of each."""
    return device.type == "cuda" and _lacking("flash4", torch.bfloat16, capability(device), False, True) is None


def _obstacle(operation: str, device: torch.device, dtype: torch.dtype, stored: str | None, cc: int) -> str | None:
    """Returns what keeps the Triton kernel from running, or None."""
    if not have_triton():
        return "Triton is not installed"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {str(dtype).removeprefix('torch.')} is neither float16 nor bfloat16"
    if interpreted():
        # It holds bfloat16 as 16-bit integers, and multiplies these.
        return "Triton's interpreter multiplies float16 alone" if dtype != torch.float16 else None
    if device.type != "cuda" and not cc:
        return f"device {device.type} is no NVIDIA GPU"
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
