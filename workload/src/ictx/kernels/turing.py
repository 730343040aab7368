"""Tensor cores on Turing (sm_75), where Triton's compiler takes sums of products in their place.

The compiler chooses matrix instructions for sm_80 and newer. Its code generator still knows Turing's, `mma` of
16 × 8 × 8, and writes them where a product's layout says version 2.1 in place of 2.0; the layouts are the same. So a
kernel is taken through the compiler's middle stage as if for sm_80, and its layouts are renamed before code is
generated. The hook is Triton's own for a pass pipeline of a kernel's own; a kernel's key in the cache tells it.
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
    """Kernels that are launched within use tensor cores on a GPU of compute capability 7.5; others are as always."""
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
    """Triton's hook: without arguments what tells the pipeline in keys, else puts the stage in place of Triton's."""
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
        ValueError: it has what Turing has not: products of another type than float16, or copies that go on beside.
    """
    from triton._C.libtriton import ir

    text = str(module)
    if others := set(re.findall(r"\btt\.dot\b.* : tensor<(?:\d+x)+(\w+),", text)) - {"f16"}:
        raise ValueError(f"Turing's tensor cores take products of float16, not {', '.join(sorted(others))}")
    if "async_copy" in text:
        raise ValueError("Turing has no asynchronous copies: launch with one stage")
    text = text.replace(f'"cuda:{AMPERE}"', f'"cuda:{TURING}"')
    text = text.replace("versionMajor = 2, versionMinor = 0", "versionMajor = 2, versionMinor = 1")
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(text)
        file.flush()
        result = ir.parse_mlir_module(file.name, module.context)
    # As the compiler does for modules that it reads: it must outlive the module.
    result.context = module.context
    return result
