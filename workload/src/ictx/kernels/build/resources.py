"""Resources of a compiled kernel, and the checks that it must pass for a release."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ictx.kernels.build.offline import Launch
from ictx.kernels.decode import tuning

SHARED_LIMIT = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Maximum shared memory per program, in bytes (CUDA C++ Programming Guide, compute capabilities)."""
REGISTERS = 65536
"""32-bit registers per multiprocessor, on every target."""
NO_PRODUCTS = (
    "attention_backward.row_sums", "next_token.begin", "next_token.best_of_all", "next_token.best_of_part",
    "products.absorb", "products.project", "rope_cache.rope_cache",
)  # fmt: skip
"""Kernels without matrix products, which need no tensor cores."""


@dataclass(frozen=True)
class Report:
    """Compilation result of a variant."""

    name: str
    target: int
    registers: int
    spilled: int
    """Bytes of local memory per thread: spilled registers."""
    shared: int
    """Bytes of shared memory per program."""
    tensor_cores: int
    """Matrix instructions in the PTX."""
    cubin: int
    """Bytes of machine code."""
    faults: tuple[str, ...]
    """Failed checks; empty if the variant may ship."""


def inspect(launch: Launch, name: str, compiled: Any) -> Report:
    """Returns the resources of a compiled kernel and its failed checks."""
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
    if launch.kernel in ("decode.decode", "decode_warpgroup.decode"):
        constants = launch.parameters
        stored = None if constants["STORED"] == "plain" else constants["STORED"]
        tuned = [
            tuning.decode_config(launch.target, constants["BLOCK_M"], stored, fast, case)
            for fast in (False, True)
            for case in tuning.CASES
        ]
        cut = constants["BLOCK_N"], constants["STAGES"]
        programs = max((config.programs for config in tuned if (config.block_n, config.stages) == cut), default=1)
    if spilled:
        faults.append(f"spills {spilled} bytes")
    shared, warps = int(compiled.metadata.shared), int(compiled.metadata.num_warps)
    if shared * programs > SHARED_LIMIT[launch.target]:
        faults.append(f"{programs} × {shared} bytes of shared memory, the limit is {SHARED_LIMIT[launch.target]}")
    if found["REG"] * 32 * warps * programs > REGISTERS:
        faults.append(f"{programs} × {warps} warps × {found['REG']} registers do not fit")
    if not matrix and launch.kernel not in NO_PRODUCTS:
        faults.append("no tensor-core instruction")
    if serialised(compiled.asm["ptx"], launch.target):
        faults.append("the assembler serialises its products")
    return Report(name, launch.target, found["REG"], spilled, shared, matrix, len(compiled.asm["cubin"]), tuple(faults))


def serialised(ptx: str, target: int) -> bool:
    """Whether the assembler serialises Hopper's products with other work, reported as notes C7510 to C7519."""
    if "wgmma.mma_async" not in ptx:
        return False
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, "utf-8")
        command = [knobs.nvidia.ptxas.path, f"--gpu-name=sm_{target}a", "-v", source, "-o", result]
        printed = subprocess.run(command, check=True, capture_output=True, text=True)
    return re.search(r"\(C751\d\)", printed.stdout + printed.stderr) is not None
