"""Tensor cores on Turing (sm_75), where Triton's compiler emits scalar multiply-adds instead.

The compiler selects matrix instructions for sm_80 and newer. Its code generator still supports Turing's, `mma` of
16 × 8 × 8, and emits them if a product's layout has version 2.1 instead of 2.0; the layouts are the same. So a kernel
goes through the compiler's middle stage as if for sm_80, and its layouts are renamed before code generation. The hook
is Triton's public one for custom pass pipelines; it adds to the kernel's cache key.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

TURING = 75
AMPERE = 80


def tensor_cores(cc: int) -> AbstractContextManager[None]:
    """Kernels launched in this context use tensor cores on compute capability 7.5; no effect on others."""
    return _hooked() if cc == TURING else nullcontext()


@contextmanager
def _hooked() -> Iterator[None]:
    from triton import knobs

    before = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = pipeline
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = before


def pipeline(*call: Any) -> tuple[str, str] | None:
    """Triton's hook: without arguments returns the pipeline's key and hash, else replaces Triton's stage."""
    if not call:
        return "turing", "'turing'"
    backend, stages, options, _, capability = call
    if capability == TURING:
        _replace(backend, stages, options)
    return None


def _replace(backend: Any, stages: MutableMapping[str, Any], options: Any) -> None:
    stages["ttgir"] = lambda module, metadata: renamed(backend.make_ttgir(module, metadata, options, AMPERE))


def renamed(module: Any) -> Any:
    """Returns a module for sm_80 as one for sm_75.

    Raises:
        ValueError: it uses features that Turing lacks: products of types other than float16, or asynchronous copies.
    """
    from triton._C.libtriton import ir

    text = str(module)
    if others := set(re.findall(r"\btt\.dot\b.* : tensor<(?:\d+x)+(\w+),", text)) - {"f16"}:
        raise ValueError(f"Turing's tensor cores support products of float16, not {', '.join(sorted(others))}")
    if "async_copy" in text:
        raise ValueError("Turing has no asynchronous copies: launch with one stage")
    text = text.replace(f'"cuda:{AMPERE}"', f'"cuda:{TURING}"')
    text = text.replace("versionMajor = 2, versionMinor = 0", "versionMajor = 2, versionMinor = 1")
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(text)
        file.flush()
        result = ir.parse_mlir_module(file.name, module.context)
    # The context must outlive the module; the compiler does the same for modules that it parses.
    result.context = module.context
    return result
