"""The part of `ictx kernels tune` for `mla_decode`: each cache dtype and number of rows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from ictx.kernels import dispatch, layout
from ictx.kernels.bench import inputs, timing
from ictx.kernels.build import build
from ictx.kernels.decode import tuning
from ictx.kernels.decode.op import block_m_of, mla_decode
from ictx.kernels.decode.tuning import DecodeConfig
from ictx.kernels.tune.kind import Kind

CASES = [(1, 131072), (32, 32768)]
"""(batch, context) of the measured cases; a candidate's score is the product of their times."""
PAGE = 64


def decode_candidates() -> list[DecodeConfig]:
    """Returns the candidate configurations of `mla_decode`; Turing supports only one stage."""
    found = []
    for block_n, warps, stages in itertools.product((16, 32, 64), (4, 8), (1, 2, 3, 4, 5)):
        for programs, registers in ((1, 0), (1, 240), (2, 0)):
            # More warps than a block has tokens for repeat each other's work; 240 registers need few warps.
            if warps * 8 <= max(block_n, 32) * 2 and not (warps == 8 and registers):
                found.append(DecodeConfig(block_n, warps, stages, programs, registers=registers))
    return found


def warpgroup_candidates(rows: int, stored: str | None, fast: bool) -> list[DecodeConfig]:
    """Returns the candidates that use Hopper's warpgroup products (`decode.warpgroup_triton`)."""
    if not fast or not stored or rows > 16:
        return []
    return [DecodeConfig(64, 4, stages, programs, warpgroup=True) for stages, programs in ((2, 2), (3, 1), (4, 1))]


def decode_kinds(target: int, fast: Callable[[str | None], bool] = lambda stored: False) -> list[Kind]:
    """Returns the kinds of input of `mla_decode`, 16-bit caches first; `fast`: `fast_memory` of a cache dtype."""
    dtype = dispatch.half(target)
    kinds = []
    for stored, rows in itertools.product(
        (None, "int8", "fp8"), sorted({block_m_of(rows, target) for rows in (1, 32)})
    ):
        if dispatch.refused("mla_decode", target, dtype, stored) is None:
            kinds.append(
                Kind(
                    "decode",
                    tuning.decode_key(rows, stored, fast(stored)),
                    tuning.decode_config(target, rows, stored, fast(stored)),
                    [*decode_candidates(), *warpgroup_candidates(rows, stored, fast(stored))],
                    functools.partial(decode_fits, target=target, stored=stored, block_m=rows),
                    functools.partial(decode_inputs, stored, rows, dtype),
                )
            )
    return kinds


def decode_fits(cache: Path, config: DecodeConfig, *, target: int, stored: str | None, block_m: int) -> bool:
    """Whether a candidate for `mla_decode` passes the release checks."""
    dtype, meta = dispatch.half(target), torch.device("meta")
    q = torch.empty(1, 1, block_m, layout.ROW, dtype=dtype, device=meta)
    row, held = (layout.ROW_BYTES, torch.uint8) if stored else (layout.ROW, dtype)
    blocks = torch.empty(2, PAGE, row, dtype=held, device=meta)
    lens, table = (torch.empty(shape, dtype=torch.int32, device=meta) for shape in ((1,), (1, 2)))
    tuning.override = config
    try:
        return build.fit(cache, target, lambda: mla_decode(q, blocks, lens, inputs.SCALE, table, stored))
    except Exception:  # a candidate that does not compile does not fit
        return False


def decode_inputs(stored: str | None, rows: int, dtype: torch.dtype) -> Callable[[DecodeConfig], float]:
    """Returns a function that measures a candidate: the product of the times of all cases."""
    given = [inputs.Inputs.make(batch, context, stored, inputs.HEADS * rows // 16, dtype) for batch, context in CASES]

    def seconds(config: DecodeConfig) -> float:
        product = 1.0
        for one in given:
            calls: list[Callable[[], object]] = [
                functools.partial(mla_decode, q, cache, one.lens, inputs.SCALE, one.table, stored, config=config)
                for q, cache in zip(one.queries, one.caches, strict=True)
            ]
            product *= timing.median_time(calls)
        return product

    return seconds
