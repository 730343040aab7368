"""Records the kernels that code would launch on a GPU that is not present, and compiles them as at run time.

Tensors are on the `meta` device and have no memory. The launching code runs unchanged; a driver reports the target to
Triton's compiler, and a hook records each launch before it is compiled.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ictx.kernels import dispatch, turing

_numbers = itertools.count(-1, -1)


class _Driver:
    """Reports a target to the compiler, without a device."""

    def __init__(self, target: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target, self.number = GPUTarget("cuda", target, 32), next(_numbers)

    def get_current_target(self) -> Any:
        """The target."""
        return self.target

    def get_current_device(self) -> int:
        """A number unique to this driver: kernels cache compiled variants by device."""
        return self.number

    def get_current_stream(self, device: int | None = None) -> int:
        """No stream."""
        return 0


@contextmanager
def standing_for(target: int) -> Iterator[None]:
    """Treats every device as a GPU of this compute capability within the context."""
    from triton.runtime import driver

    before = driver._active, dispatch.standing_for, dispatch.standing_fast
    driver.set_active(_Driver(target))
    dispatch.standing_for = target
    try:
        yield
    finally:
        driver._active, dispatch.standing_for, dispatch.standing_fast = before


@contextmanager
def compiling(cache: Path, target: int) -> Iterator[None]:
    """Within the context, compiles for `target` into `cache`, always: a report needs files that are not kept."""
    from triton import knobs
    from triton.runtime.cache import FileCacheManager

    with standing_for(target), knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(cache)
        # Not the class that reads a shipped folder.
        knobs.cache.manager_class = FileCacheManager
        knobs.compilation.always_compile = True
        yield


@dataclass(frozen=True)
class Launch:
    """A kernel with the parameters that it is compiled for."""

    module: str
    function: str
    target: int
    specialisation: str
    """Types, constants, alignments and options as JSON, from which Triton compiles."""
    turing: bool = False
    """Whether it was launched within `turing.tensor_cores`."""

    @property
    def kernel(self) -> str:
        """The kernel's name in reports, such as decode.decode."""
        _, operation, file = self.module.rsplit(".", 2)
        return f"{operation}_{file}".removesuffix("_triton") + f".{self.function}"

    @property
    def digest(self) -> str:
        """Identifies the launch independent of Triton's install path, which its options contain in library paths."""
        content = json.loads(self.specialisation)
        content["options"]["extern_libs"] = [name for name, _ in content["options"]["extern_libs"]]
        parts = f"{self.module} {self.function} {self.turing} {json.dumps(content)}"
        return hashlib.sha256(parts.encode()).hexdigest()[:12]

    @property
    def parameters(self) -> dict[str, Any]:
        """Values of the constant parameters, by name."""
        content = json.loads(self.specialisation)
        names = list(content["signature"])
        pairs = zip(content["constant_keys"], content["constant_vals"], strict=True)
        return {names[path[0]]: value for path, value in pairs if len(path) == 1}

    @property
    def dtype(self) -> str:
        """Dtype of its first tensor, as named by Triton."""
        types = (str(kind) for kind in json.loads(self.specialisation)["signature"].values())
        first = next(kind for kind in types if kind.startswith(("*", "tensordesc")))
        return first.removeprefix("tensordesc<").removeprefix("*").split("[")[0]

    def compile(self) -> Any:
        """Returns Triton's compiled kernel; call it within `compiling` for its target."""
        from triton import compile as compiled
        from triton.compiler import ASTSource, make_backend
        from triton.experimental.gluon._runtime import GluonASTSource
        from triton.runtime import driver

        # JITFunction.preload reads the same JSON, but interprets the constant "int8" as a dtype.
        content = json.loads(self.specialisation)
        constants, attributes = (
            dict(zip(map(tuple, content[f"{kind}_keys"]), content[f"{kind}_vals"], strict=True))
            for kind in ("constant", "attrs")
        )
        kernel = getattr(importlib.import_module(self.module), self.function)
        target = driver.active.get_current_target()
        options = make_backend(target).parse_options(_tuples(content["options"]))
        source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
            kernel, content["signature"], constants, attributes
        )
        with turing.tensor_cores(self.target) if self.turing else nullcontext():
            return compiled(source, target=target, options=options.__dict__)


def _tuples(value: Any) -> Any:
    """Returns options with JSON's lists converted back to tuples."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def launches(run: Callable[[], object], target: int) -> list[Launch]:
    """Returns the distinct launches of `run`, on meta tensors, for a GPU of this capability."""
    from triton import knobs

    found: dict[Launch, None] = {}

    def take(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        own = knobs.runtime.add_stages_inspection_hook is turing.pipeline
        found[Launch(fn.module, fn.name, target, compile["specialization_data"], own)] = None
        # Neither compiled nor launched.
        return True

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = take
    try:
        with standing_for(target):
            run()
    finally:
        knobs.runtime.jit_cache_hook = before
    return list(found)


def names(found: Iterable[Launch]) -> dict[Launch, str]:
    """Returns names for launches of one target: kernel, dtype and the constants that differ within a kernel."""
    kernels: dict[str, list[Launch]] = defaultdict(list)
    for launch in found:
        kernels[launch.kernel].append(launch)
    result: dict[Launch, str] = {}
    for kernel, group in kernels.items():
        constants = {launch: launch.parameters for launch in group}
        keys = sorted({key for values in constants.values() for key in values})
        varying = [key for key in keys if len({str(values.get(key)) for values in constants.values()}) > 1]
        for launch, values in constants.items():
            options = ",".join(f"{key.lower()}={values[key]}" for key in varying if key in values)
            name = "/".join(part for part in (kernel, launch.dtype, options) if part)
            # Variants that differ only in alignments or options get a suffix.
            result[launch] = f"{name}/{launch.digest[:4]}" if name in result.values() else name
    return result
