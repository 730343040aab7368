"""What `ictx kernels build` compiles of `mla_attention` and `mla_prefill`, for a model with heads of 192 and 128."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ictx.kernels.attention import constants
from ictx.kernels.attention_tuning import Tiles, attention_config

KERNELS = (
    "mla_attention.forward", "mla_attention.row_sums", "mla_attention.keys_values", "mla_attention.queries",
    "mla_prefill.whole", "mla_prefill.part",
)  # fmt: skip
"""Kernels of training, where documents are packed, and of a prefill in one part and in several."""

NO_PRODUCTS = ("mla_attention.row_sums",)
"""Kernels that need no tensor cores."""


def serialised(ptx: str, target: int) -> bool:
    """Whether the assembler gives up running Hopper's products beside other work, as its notes C7510 to C7519 say."""
    if "wgmma.mma_async" not in ptx:
        return False
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx, "utf-8")
        command = [knobs.nvidia.ptxas.path, f"--gpu-name=sm_{target}a", "-v", source, "-o", result]
        told = subprocess.run(command, check=True, capture_output=True, text=True)
    return re.search(r"\(C751\d\)", told.stdout + told.stderr) is not None


def tiles_of(kernel: str, target: int) -> Tiles:
    """Returns how a kernel is cut up on a target."""
    config = attention_config(target)
    return {"keys_values": config.keys_values, "queries": config.queries}.get(kernel.split(".")[1], config.forward)


def compile_kernel(kernel: str, target: int, dtype: Any) -> Any:
    """Returns Triton's compiled kernel, as at run time."""
    import torch
    from triton.runtime.jit import MockTensor

    from ictx.kernels import attention_backward_triton, attention_triton

    tensor = MockTensor.wrap_dtype
    tiles = tiles_of(kernel, target)

    def read(rows: int, columns: int) -> Any:
        if not tiles.tma:
            return tensor(dtype)
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(torch.empty(1, dtype=dtype), [64, 3072], [3072, 1], [rows, columns])

    out, float32, int32 = tensor(dtype), tensor(torch.float32), tensor(torch.int32)
    queries = [read(tiles.block_m, 128), read(tiles.block_m, 64)]
    keys = [read(tiles.block_n, 128), read(tiles.block_n, 64), read(tiles.block_n, 128)]
    fixed = constants(128, 64, 128, tiles, kernel.startswith("mla_attention"))
    # Strides, where only whether 16 divides them counts, and numbers that the code does not depend on.
    strides, rows = [16] * 8, 3
    name = kernel.split(".")[1]
    if name == "row_sums":
        kernel_function, arguments, fixed = (
            attention_backward_triton.row_sums,
            [out, out, float32, float32, 16, 16, rows, 256, 16],
            {"DV": 128, "ROWS": 64},
        )
    elif name == "keys_values":
        kernel_function, arguments = (
            attention_backward_triton.keys_values,
            [*queries, *keys, read(tiles.block_m, 128), out, out, float32, int32, *strides, rows, 256, 16, 3, 0.1, 0.1],
        )
    elif name == "queries":
        kernel_function, arguments = (
            attention_backward_triton.queries,
            [*queries, *keys, read(tiles.block_m, 128), out, float32, int32, *strides, rows, 256, 16, 3, 0.1, 0.1],
        )
    else:
        part, packed = name == "part", name == "forward"
        fixed = {**fixed, "CARRY": part, "AHEAD": tiles.ahead}
        target_of, first = float32 if part else out, int32 if packed else float32
        kernel_function, arguments = (
            attention_triton.forward,
            [*queries, *keys, target_of, float32, first, *strides, rows, rows, rows, 16, rows, 0.1],
        )
    result = kernel_function.warmup(*arguments, grid=(1,), **fixed)
    return result.result() if hasattr(result, "result") else result
