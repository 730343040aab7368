"""`ictx kernels bench`: measures our kernels and other libraries on the same inputs in the same run.

The same run measures the upper limits: copy bandwidth and matrix rate.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import torch

from ictx.errors import UserError
from ictx.kernels.bench import attention, decode
from ictx.kernels.bench.timing import copy_bandwidth, matrix_rate


def main(out: Path, quick: bool, only: str | None = None, peers: bool = True) -> int:
    """Measures, prints and saves; returns the exit status. Raises UserError if there is no GPU."""
    if not torch.cuda.is_available():
        raise UserError("no NVIDIA GPU found: run `ictx kernels bench` on a machine with one")
    import triton

    out.mkdir(parents=True, exist_ok=True)
    bandwidth, rate = copy_bandwidth(), matrix_rate()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"{datetime.date.today()}"
    )
    print(f"copy {bandwidth * 1e-12:.3f} TB/s, bfloat16 product {rate * 1e-12:.0f} TFLOP/s")
    if only != "attention":
        decode.run(out, quick, bandwidth, peers)
    if only != "decode":
        attention.save(attention.measure(rate, quick, peers), out)
    return 0
