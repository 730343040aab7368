"""`mla_decode`: absorbed attention of a few new tokens over the latent cache."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ictx.kernels import dispatch, layout, turing
from ictx.kernels.decode import reference
from ictx.kernels.decode.tuning import DecodeConfig, decode_config
from ictx.kernels.layout import LATENT, ROPE, ROW, ROW_BYTES

INTERPRETER = DecodeConfig(block_n=64, warps=4, stages=1, programs=1, reduce_all=False)
"""Configuration for Triton's interpreter, which runs programs sequentially: none may wait for another."""
INTERPRETER_PROGRAMS = 3
MOST_QUERIES, MOST_HEADS = 8, 128
"""Limits per sequence and launch."""
SHORT, SHORT_QUANTISED, SHORT_QUANTISED_HBM3 = 8192, 4096, 131072
"""Capacity of a batch's caches in tokens up to which GPUs with fast memory use the standard configuration: with little
to read, fewer programs finish sooner. For quantised caches on an H100 (HBM3) the limit is higher."""
SHORTEST = 4096
"""Capacity in tokens up to which a multiprocessor has at most one tile."""


@dataclass
class Workspace:
    """Partial results and counters of one stream; concurrent launches must not share a workspace.

    Between launches a counter is 0, or also -2^31 if all programs join results.
    """

    part: Tensor
    part_lse: Tensor
    counters: Tensor

    @classmethod
    def make(cls, device: torch.device, programs: int, block_m: int, items: int) -> Workspace:
        """Returns a workspace for `programs`, `block_m` rows per program, and `items` row blocks of all sequences."""
        return cls(
            torch.empty(2 * programs * block_m * LATENT, dtype=torch.float16, device=device),
            torch.empty(2 * programs * block_m, dtype=torch.float32, device=device),
            torch.zeros(items, dtype=torch.int32, device=device),
        )

    @classmethod
    def of(
        cls, device: torch.device, batch: int, rows: int, dtype: torch.dtype, stored: str | None
    ) -> Workspace | None:
        """Returns a workspace for launches with `batch` sequences of `rows` (positions × heads); None for PyTorch."""
        if dispatch.choose("mla_decode", device, dtype, stored=stored).name == "torch":
            return None
        block_m = block_m_of(rows, dispatch.capability(device))
        return cls.make(device, launch_of(device, block_m, stored)[1], block_m, batch * -(-rows // block_m))

    def fits(self, programs: int, block_m: int, items: int) -> bool:
        """Whether the workspace is large enough."""
        return self.part_lse.numel() >= 2 * programs * block_m and self.counters.numel() >= items


_workspaces: dict[tuple[torch.device, int], Workspace] = {}


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Returns the number of multiprocessors; 1 in ahead-of-time compilation."""
    return 1 if device.type != "cuda" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def _workspace(device: torch.device, programs: int, block_m: int, items: int) -> Workspace:
    """Returns the current stream's workspace, reallocated if it is too small."""
    on_gpu = device.type == "cuda"
    key = (device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0)
    found = _workspaces.get(key)
    if found is None or not found.fits(programs, block_m, items):
        # Rounded up, so that a growing batch does not reallocate at each step.
        found = Workspace.make(device, programs, block_m, max(256, 1 << (items - 1).bit_length()))
        # Memory allocated during a capture is zeroed when the graph is replayed, so only the graph may use it.
        if not (on_gpu and torch.cuda.is_current_stream_capturing()):
            _workspaces[key] = found
    return found


def mla_decode(
    q: Tensor,
    cache: Tensor,
    lens: Tensor,
    scale: float,
    table: Tensor | None = None,
    stored: str | None = None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
    config: DecodeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends to the cached tokens of each sequence, including the new ones, causally among the new ones.

    Args:
        q: absorbed queries [batch, query, heads, 576], query 1–8, heads 1–128: latent part, then rotary part.
        cache: [blocks, block_size, 576] in q's dtype, or uint8 [blocks, block_size, 656] (see `layout`).
        lens: cached tokens of each sequence, including the new ones, int32 [batch]. 0 gives zeros.
        scale: factor on the scores before the softmax.
        table: blocks of each sequence, int32 [batch, max_blocks]; None if block b belongs to sequence b.
        stored: dtype of a quantised latent, int8 or fp8.
        out: output tensor, contiguous [batch, query, heads, 512]; allocated by default.
        workspace: memory for partial results; by default one per stream.
        config: replaces the tuned configuration.

    Returns:
        Attended latents [batch, query, heads, 512] in q's dtype, and the natural log-sum-exp of the scaled scores,
        float32 [batch, query, heads] (-inf if there are no tokens to attend to).

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    _check(q, cache, lens, table, stored)
    choice = dispatch.choose("mla_decode", q.device, q.dtype, stored=stored)
    if choice.name == "torch":
        result, lse = reference.mla_decode(q, cache, lens, scale, table, stored)
        return (out.copy_(result) if out is not None else result), lse
    return _launch(q, cache, lens, scale, table, stored, out, workspace, config)


def _check(q: Tensor, cache: Tensor, lens: Tensor, table: Tensor | None, stored: str | None) -> None:
    """Raises ValueError for inputs that the kernel does not support."""
    if q.dim() != 4 or q.shape[-1] != ROW or not (1 <= q.shape[1] <= MOST_QUERIES and 1 <= q.shape[2] <= MOST_HEADS):
        raise ValueError(f"q is {list(q.shape)}: expected [batch, 1 to {MOST_QUERIES}, 1 to {MOST_HEADS} heads, {ROW}]")
    layout.check(cache, q.dtype, stored)
    if lens.shape != (q.shape[0],) or lens.dtype != torch.int32:
        raise ValueError(f"lens is {list(lens.shape)} {lens.dtype}: expected [{q.shape[0]}] int32")
    if table is not None:
        if table.dim() != 2 or table.shape[0] != q.shape[0] or table.dtype != torch.int32 or table.stride(1) != 1:
            raise ValueError(f"table is {list(table.shape)} {table.dtype}: expected [{q.shape[0]}, max_blocks] int32")
        if cache.shape[1] & (cache.shape[1] - 1):
            raise ValueError(f"block_size is {cache.shape[1]}: expected a power of 2")
    elif cache.shape[0] < q.shape[0]:
        raise ValueError(f"cache has {cache.shape[0]} blocks for {q.shape[0]} sequences: pass a table")


def block_m_of(rows: int, cc: int) -> int:
    """Returns the rows (query position × head) per program; 16 on Turing, which has too few registers for 32."""
    return 16 if rows <= 16 or 0 < cc < 80 else 32


def launch_of(
    device: torch.device,
    block_m: int,
    stored: str | None,
    config: DecodeConfig | None = None,
    room: int | None = None,
    batch: int | None = None,
) -> tuple[DecodeConfig, int]:
    """Returns the configuration, tuned unless one is given, and the number of programs.

    `room` is the capacity in tokens of the caches of all sequences, since their lengths are unknown on the host; None
    means a large capacity. `batch` is the number of sequences; None means several.
    """
    if dispatch.interpreted():
        return replace(config or INTERPRETER, reduce_all=False, warpgroup=False), INTERPRETER_PROGRAMS
    quantised = SHORT_QUANTISED if dispatch.fast_memory(device) else SHORT_QUANTISED_HBM3
    short = room is not None and room <= (quantised if stored else SHORT)
    fast = dispatch.fast_memory(device, stored) and not short
    case = "short" if room is not None and room <= SHORTEST else "one" if batch == 1 else ""
    config = config or decode_config(dispatch.capability(device), block_m, stored, fast, case)
    return config, multiprocessors(device) * config.programs


def constants(stored: str | None, page: int, block_m: int, config: DecodeConfig, early: bool) -> dict[str, Any]:
    """Returns the kernel's compile-time parameters and options."""
    options: dict[str, Any] = {"num_warps": config.warps}
    if config.reduce_all:
        options["launch_cooperative_grid"] = True
    if config.registers:
        options["maxnreg"] = config.registers
    return options | {
        "LATENT": LATENT,
        "ROPE": ROPE,
        "PAGE": page,
        "STORED": stored or "plain",
        "ASM": not dispatch.interpreted(),
        "ROW": ROW,
        "BLOCK_WORDS": ROW_BYTES // 2,
        "BLOCK_M": block_m,
        "BLOCK_N": config.block_n,
        "REDUCE_ALL": config.reduce_all,
        "STAGES": config.stages,
        "SCAN": config.scan,
        "COLS": config.columns or 64,
        "PARTS": config.parts,
        **dispatch.launch_options(early),
    }


def _launch(
    q: Tensor,
    cache: Tensor,
    lens: Tensor,
    scale: float,
    table: Tensor | None,
    stored: str | None,
    out: Tensor | None,
    workspace: Workspace | None,
    config: DecodeConfig | None,
) -> tuple[Tensor, Tensor]:
    """Runs the Triton kernel."""
    batch, query, heads, _ = q.shape
    rows, block_m = query * heads, block_m_of(query * heads, dispatch.capability(q.device))
    row_blocks = -(-rows // block_m)
    if q.stride(3) != 1 or q.stride(1) != heads * q.stride(2) or q.stride(2) % 8 or q.stride(0) % 8:
        q = q.contiguous()
    if out is None:
        out = torch.empty(batch, query, heads, LATENT, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, query, heads, dtype=torch.float32, device=q.device)
    if batch == 0:
        return out, lse
    room = batch * cache.shape[1] * (1 if table is None else table.shape[1])
    config, programs = launch_of(q.device, block_m, stored, config, room, batch)
    if config.warpgroup:
        from ictx.kernels.decode.warpgroup_triton import decode as kernel
    else:
        from ictx.kernels.decode.triton import decode as kernel
    work = workspace or _workspace(q.device, programs, block_m, batch * row_blocks)
    # Views of the same bytes in each dtype of a row.
    flat = layout.flat(cache)
    latent = scales = rope = flat
    if stored:
        latent, scales, rope = flat.view(torch.int16), flat.view(torch.float32), flat.view(q.dtype)
    with turing.tensor_cores(dispatch.capability(q.device)):
        kernel[(programs,)](
            q, latent, scales, rope, table if table is not None else lens, lens, out, lse,
            work.part.view(q.dtype), work.part_lse, work.counters, scale * math.log2(math.e),
            q.stride(0) // 8, q.stride(2) // 8, cache.stride(0) // cache.stride(1), cache.shape[1],
            table.stride(0) if table is not None else 0, batch, rows, heads, row_blocks, query,
            **constants(
                stored, 0 if table is None else cache.shape[1], block_m, config, dispatch.launches_early(q.device)
            ),
        )  # fmt: skip
    return out, lse
