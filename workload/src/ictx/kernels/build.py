"""Ahead-of-time compilation: every variant of every kernel for every target, with no GPU present.

The compiler is called exactly as at run time, against a driver that only names the target, so its cache holds what
a process on such a GPU asks for. Beside it lies a manifest of the sources, the versions and the resources that each
variant takes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ictx.errors import UserError
from ictx.kernels import attention_build, dispatch, tuning

TARGETS = (75, 80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Most shared memory of a program, in bytes (CUDA C++ Programming Guide, compute capabilities)."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
REGISTERS = 65536
"""32-bit registers of a multiprocessor, on every target."""
MANIFEST = "ictx-kernels.json"


@dataclass(frozen=True)
class Variant:
    """One kernel, compiled for one target."""

    kernel: str
    target: int
    dtype: str
    stored: str | None
    page: int = 0
    block_m: int = 0

    @property
    def name(self) -> str:
        """Names it in reports."""
        if self.kernel in attention_build.KERNELS:
            return f"{self.kernel}/{self.dtype}"
        blocks = f"/page{self.page}/rows{self.block_m}" if self.block_m else ""
        return f"{self.kernel}/{self.dtype}/{self.stored or 'plain'}{blocks}"


@dataclass(frozen=True)
class Report:
    """What the compiler made of a variant."""

    name: str
    target: int
    registers: int
    spilled: int
    """Bytes of local memory of a thread: its stack, which holds what registers could not."""
    shared: int
    """Bytes of shared memory of a program."""
    tensor_cores: int
    """Matrix instructions in the PTX."""
    cubin: int
    """Bytes of machine code."""
    faults: tuple[str, ...]
    """Why a release must not ship this."""


def variants(targets: tuple[int, ...]) -> Iterator[Variant]:
    """Yields the variants that are compiled ahead of time for these targets."""
    # What is not here compiles at its first use.
    for target in targets:
        dtypes = ("bf16", "fp16") if target >= 80 else ("fp16",)
        for dtype, stored in itertools.product(dtypes, (None, "int8", "fp8")):
            if dispatch.refused("mla_rope_cache", target, DTYPES[dtype], stored) is None:
                yield Variant("mla_rope_cache", target, dtype, stored)
            if dispatch.refused("mla_decode", target, DTYPES[dtype], stored):
                continue
            # Nobody keeps a quantised cache without blocks. Before sm_80 float16 is what there is.
            main = dtype == "bf16" or target < 80
            pages = (64,) if not main else (16, 64) if stored else (0, 16, 64)
            for page in pages:
                yield Variant("mla_decode", target, dtype, stored, page, 16)
            if dtype == "bf16":
                yield Variant("mla_decode", target, dtype, stored, 64, 32)
        if dispatch.refused("mla_attention", target, torch.bfloat16, None) is None:
            for kernel in attention_build.KERNELS:
                yield Variant(kernel, target, "bf16", None)


def default_cache() -> Path:
    """Returns the folder that the variable ICTX_KERNEL_CACHE names, or one below the user's cache."""
    named = os.environ.get("ICTX_KERNEL_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "ictx", "kernels")


def fingerprint() -> dict[str, str]:
    """Returns what a cache depends on: our sources and configurations, Triton's version, the assembler's version."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version

    digest = hashlib.sha256()
    kernels = sorted(Path(__file__).parent.glob("*_triton.py"))
    callers = ("attention.py", "decode.py", "prefill.py", "rope_cache.py")
    for path in [*kernels, tuning.FILE, *(Path(__file__).with_name(name) for name in callers)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    assembler = hashlib.sha256(str(get_ptxas_version(90)).encode()).hexdigest()[:16]
    return {"sources": digest.hexdigest(), "triton": triton.__version__, "assembler": assembler}


def state(cache: Path) -> str:
    """Returns "fresh", or why the cache must not be used."""
    try:
        manifest = json.loads((cache / MANIFEST).read_text("utf-8"))
        kept = manifest["fingerprint"]
    except FileNotFoundError:
        return "missing"
    except (ValueError, KeyError, TypeError):
        return "unreadable"
    now = fingerprint()
    changed = [key for key in now if kept.get(key) != now[key]]
    return f"stale: {', '.join(changed)} changed" if changed else "fresh"


class _Driver:
    """Names a target to the compiler; there is no device behind it."""

    def __init__(self, target: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", target, 32)

    def get_current_target(self) -> Any:
        """The target."""
        return self.target

    def get_current_device(self) -> int:
        """A number of its own for each target: kernels keep what they compiled by device."""
        return -int(self.target.arch)

    def get_current_stream(self, device: int | None = None) -> int:
        """No stream."""
        return 0


@contextmanager
def compiling(cache: Path, target: int) -> Iterator[None]:
    """Compiles for `target` into `cache` within."""
    from triton import knobs
    from triton.runtime import driver

    before = driver._active
    with knobs.cache.scope():
        knobs.cache.dir = str(cache)
        driver.set_active(_Driver(target))
        try:
            yield
        finally:
            driver._active = before


def compile_variant(variant: Variant) -> Any:
    """Returns Triton's compiled kernel of a variant, as at run time."""
    if variant.kernel in attention_build.KERNELS:
        return attention_build.compile_kernel(variant.kernel, variant.target, DTYPES[variant.dtype])
    kernel = {"mla_decode": _warm_decode, "mla_rope_cache": _warm_rope_cache}[variant.kernel]
    result = kernel(variant)
    return result.result() if hasattr(result, "result") else result


def _warm_decode(variant: Variant) -> Any:
    """Compiles `mla_decode`."""
    from triton.runtime.jit import MockTensor

    from ictx.kernels.decode import constants
    from ictx.kernels.decode_triton import decode

    tensor = MockTensor.wrap_dtype
    dtype = DTYPES[variant.dtype]
    config = tuning.decode_config(variant.target, variant.block_m, variant.stored)
    float32, int32 = tensor(torch.float32), tensor(torch.int32)
    return decode.warmup(
        tensor(dtype), tensor(torch.int16 if variant.stored else dtype), float32 if variant.stored else tensor(dtype),
        tensor(dtype), int32, int32, tensor(dtype), float32,
        tensor(dtype), float32, int32, 0.1, 72, 72, 72, 72, 72, 2, 16, 16, 1, 1,
        grid=(1,), **constants(variant.stored, variant.page, variant.block_m, config),
    )  # fmt: skip


def _warm_rope_cache(variant: Variant) -> Any:
    """Compiles `mla_rope_cache`."""
    from triton.runtime.jit import MockTensor

    from ictx.kernels.rope_cache import constants
    from ictx.kernels.rope_cache_triton import rope_cache

    tensor = MockTensor.wrap_dtype
    dtype = tensor(DTYPES[variant.dtype])
    float32 = tensor(torch.float32)
    return rope_cache.warmup(
        dtype, dtype, float32, float32, tensor(torch.int64), tensor(torch.uint8) if variant.stored else dtype,
        float32 if variant.stored else dtype, dtype, 1e-6, 72, 72, 72, grid=(1,),
        **constants(variant.stored, variant.target >= dispatch.EARLY),
    )  # fmt: skip


def inspect(variant: Variant, compiled: Any) -> Report:
    """Returns the resources of a compiled variant, and what is wrong with them."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [program, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        )
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    matrix = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", compiled.asm["ptx"]))
    spilled = found["STACK"] + found["LOCAL"]
    faults = []
    programs = 1
    if variant.kernel == "mla_decode":
        programs = tuning.decode_config(variant.target, variant.block_m, variant.stored).programs
    if spilled:
        faults.append(f"spills {spilled} bytes")
    shared, warps = int(compiled.metadata.shared), int(compiled.metadata.num_warps)
    if shared * programs > SHARED_LIMIT[variant.target]:
        faults.append(f"{programs} × {shared} bytes of shared memory, the limit is {SHARED_LIMIT[variant.target]}")
    if found["REG"] * 32 * warps * programs > REGISTERS:
        faults.append(f"{programs} × {warps} warps × {found['REG']} registers do not fit")
    # Triton's products use tensor cores from sm_80 on; before, they are sums of products.
    if not matrix and variant.target >= 80 and variant.kernel not in (*attention_build.NO_PRODUCTS, "mla_rope_cache"):
        faults.append("no tensor-core instruction")
    if attention_build.serialised(compiled.asm["ptx"], variant.target):
        faults.append("the assembler serialises its products")
    return Report(
        variant.name, variant.target, found["REG"], spilled, shared, matrix, len(compiled.asm["cubin"]), tuple(faults)
    )


def build(cache: Path, targets: tuple[int, ...] = TARGETS, jobs: int = 2) -> list[Report]:
    """Compiles what is missing, or everything where the cache is stale or foreign; returns a report per variant."""
    if not dispatch.have_triton():
        raise UserError("Triton is not installed: nothing can be compiled")
    if dispatch.interpreted():
        raise UserError("TRITON_INTERPRET is set: Triton interprets kernels and compiles none")
    now = state(cache)
    if cache.exists() and now != "fresh":
        # Only what a build of ours left is cleared: a mistyped folder is not.
        if now == "missing" and any(cache.iterdir()):
            raise UserError(f"{cache} is not empty and holds no {MANIFEST}: name an empty folder")
        shutil.rmtree(cache)
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / MANIFEST
    manifest: dict[str, Any] = {"fingerprint": fingerprint(), "reports": {}}
    if path.exists():
        manifest = json.loads(path.read_text("utf-8"))
    else:
        path.write_text(json.dumps(manifest), "utf-8")
    missing = [variant for variant in variants(targets) if _key(variant) not in manifest["reports"]]
    # Processes of their own: the compiler holds Python's lock. Spawned: torch's threads do not survive a fork.
    with ProcessPoolExecutor(min(jobs, len(missing)) or 1, multiprocessing.get_context("spawn")) as pool:
        for variant, report in zip(missing, pool.map(build_one, [cache] * len(missing), missing), strict=True):
            manifest["reports"][_key(variant)] = asdict(report)
            draft = path.with_suffix(".part")
            draft.write_text(json.dumps(manifest, indent=1, sort_keys=True), "utf-8")
            draft.replace(path)
    entries = (manifest["reports"][_key(variant)] for variant in variants(targets))
    return [Report(**{**entry, "faults": tuple(entry["faults"])}) for entry in entries]


def _key(variant: Variant) -> str:
    """Names a variant in the manifest."""
    return f"sm_{variant.target}/{variant.name}"


def build_one(cache: Path, variant: Variant) -> Report:
    """Compiles and inspects one variant."""
    with compiling(cache, variant.target):
        return inspect(variant, compile_variant(variant))
