"""`mla_attention`: causal attention among the tokens of packed documents, with its gradient, for training."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ictx.kernels import dispatch, turing
from ictx.kernels.attention import flash4, reference
from ictx.kernels.attention.tuning import AttentionConfig, Tiles, attention_config

LIMIT = 1 << 31
"""Values of a tensor from which on offsets of 32 bits do not reach; our kernels count with 64."""
WIDEST, WIDEST_VALUE = 192, 128
"""Columns of a head's queries and values that the kernels' tiles are cut for."""


@dataclass(frozen=True)
class Packing:
    """Where the documents of packed tokens lie; the same in every layer, so computed once."""

    first: Tensor
    """First token of each token's document, int32 [tokens]."""
    end: Tensor
    """End of each token's document, int32 [tokens]."""
    equal: int = 0
    """Documents, where they are known to be equally long without a look at the tensors; otherwise 0."""
    edges: Tensor | None = None
    """First token of each document and the end of the last, int32 [documents + 1], where a library may ask for it."""

    @classmethod
    @functools.lru_cache(8)
    def of_rows(cls, rows: int, length: int, device: torch.device) -> Packing:
        """Returns the packing of rows that are one document each."""
        # Kept for later calls, which may compute gradients where this one does not.
        with torch.inference_mode(False):
            places = torch.arange(rows * length, dtype=torch.int32, device=device)
            first = places - places % max(length, 1)
            return cls(first, first + length, rows)

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int) -> Packing:
        """Returns it without waiting for the device. Tokens behind the last document are one more document."""
        places = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
        document = torch.searchsorted(cu_seqlens, places, right=True)
        edges = F.pad(F.pad(cu_seqlens, (1, 0)), (0, 1), value=tokens)
        return cls(edges[document], edges[document + 1], edges=edges)

    @classmethod
    def of_starts(cls, starts: Tensor) -> Packing:
        """Returns it from whether a document starts at each token, bool [tokens].

        Waits for the device only where a library that takes the documents' edges may attend.
        """
        places = torch.arange(len(starts), dtype=torch.int32, device=starts.device)
        first = torch.where(starts, places, 0).cummax(0).values
        # The end of a token's document is the first start behind the token.
        later = F.pad(torch.where(starts, places, len(starts))[1:], (0, 1), value=len(starts))
        end, edges = later.flip(0).cummin(0).values.flip(0), None
        if dispatch.takes_edges(starts.device):
            edges = F.pad((first == places).nonzero().flatten().int(), (0, 1), value=len(starts))
        return cls(first, end, edges=edges)

    def bounds(self) -> list[int]:
        """Returns the first token of each document; waits for the device."""
        return list(dict.fromkeys(self.first.tolist()))


def widths(columns: int) -> tuple[int, int]:
    """Returns the two powers of 2, the second at most half of the first or 0, that hold so many columns."""
    whole = max(16, 1 << (columns.bit_length() - 1))
    rest = columns - whole
    second = 0 if rest <= 0 else max(16, 1 << (rest - 1).bit_length())
    return (whole, second) if second < whole else (2 * whole, 0)


def choice(operation: str, q: Tensor, value_width: int, equal: int = 0, edges: bool = False) -> dispatch.Choice:
    """Returns which implementation attends with these queries [..., width], and why.

    Args:
        equal: a `Packing`'s.
        edges: whether it has its documents' edges.
    """
    wide = q.shape[-1] > WIDEST or value_width > WIDEST_VALUE
    shape = f"heads of {q.shape[-1]} and {value_width} columns are wider than {WIDEST} and {WIDEST_VALUE}"
    known = (q.shape[-1], value_width) == flash4.WIDTHS and (equal > 0 or edges)
    return dispatch.choose(operation, q.device, q.dtype, shape=shape if wide else None, equal=bool(equal), flash4=known)


def mla_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    cu_seqlens: Tensor | Packing | None = None,
    *,
    config: AttentionConfig | None = None,
) -> Tensor:
    """Attends causally within each document: softmax(q · kᵀ · scale) · v, differentiable in q, k and v.

    Result and gradients of the Triton kernels have the same bits in each run; `dispatch` takes these, and no library,
    where `torch.use_deterministic_algorithms` is on.

    Args:
        q: queries [tokens, heads, width]; the kernels take widths up to 192, PyTorch the others.
        k: keys, of the shape and dtype of q.
        v: values [tokens, heads, value width] in q's dtype; the kernels take value widths up to 128.
        scale: factor on the scores before the softmax, above 0.
        cu_seqlens: first token of each document in ascending order, and the end of the last, int32 [documents + 1];
            or a `Packing`, made once for all layers. One document when it is not given.
        config: replaces the tuned configuration.

    Returns:
        Attended values [tokens, heads, value width] in q's dtype, contiguous.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    if q.dim() != 3 or not q.shape[1] * q.shape[2]:
        raise ValueError(f"q is {list(q.shape)}: expected [tokens, heads, width]")
    if k.shape != q.shape or k.dtype != q.dtype:
        raise ValueError(f"k is {list(k.shape)} {k.dtype}: expected {list(q.shape)} {q.dtype}")
    if v.dim() != 3 or v.shape[:2] != q.shape[:2] or not v.shape[2] or v.dtype != q.dtype:
        raise ValueError(f"v is {list(v.shape)} {v.dtype}: expected {[*q.shape[:2], 'width']} {q.dtype}")
    if not scale > 0:
        raise ValueError(f"scale is {scale}: expected more than 0")
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or not len(cu_seqlens):
            raise ValueError(
                f"cu_seqlens is {list(cu_seqlens.shape)} {cu_seqlens.dtype}: expected [documents + 1] int32"
            )
        cu_seqlens = Packing.of(cu_seqlens, q.shape[0])
    packing = cu_seqlens
    if packing is not None and packing.first.shape != q.shape[:1]:
        raise ValueError(f"cu_seqlens is for {len(packing.first)} tokens: expected {q.shape[0]}")
    equal = packing.equal if packing else 1
    edges = packing.edges if packing else None
    name = choice("mla_attention", q, v.shape[-1], equal, edges is not None).name
    if name == "torch":
        return reference.mla_attention(q, k, v, scale, packing.bounds() if packing else [])
    short = config is None and q.numel() < LIMIT
    if name == "flash4" and short:
        return flash4.attend(q, k, v, scale, equal, None if equal else edges)
    if name == "cudnn" and short:
        return cudnn(q, k, v, scale, equal)
    numbers = config.numbers() if config else tiles(q.device)
    first, end = (packing.first, packing.end) if packing else (None, None)
    out, _ = torch.ops.ictx.mla_attention(*padded(q, k, v), scale, first, end, numbers)
    return cast(Tensor, out)[..., : v.shape[-1]]


def padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns them with columns of 0, which change no score, up to the widths that the kernels take."""
    columns = sum(widths(q.shape[-1])) - q.shape[-1]
    value = max(16, 1 << (v.shape[-1] - 1).bit_length()) - v.shape[-1]
    if columns:
        q, k = F.pad(q, (0, columns)), F.pad(k, (0, columns))
    return q, k, F.pad(v, (0, value)) if value else v


@dispatch.constant
def tiles(device: torch.device) -> list[int]:
    """Returns the tuned configuration; a constant for torch.compile, which cannot read files."""
    return attention_config(dispatch.capability(device)).numbers()


def cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, rows: int) -> Tensor:
    """The same by cuDNN, where the tokens are so many equally long documents."""
    q, k, v = (x.view(rows, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    # Not by F.scaled_dot_product_attention, which would fall back to a slower kernel without a word.
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    out: Tensor = attend(q, k, v, None, True, 0.0, True, False, scale=scale)[0]
    return out.transpose(1, 2).flatten(0, 1)


def readable(x: Tensor) -> Tensor:
    """Returns x [tokens, heads, columns], copied where the kernels cannot read it as it lies."""
    aligned = all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:2])
    return x if x.stride(2) == 1 and aligned and x.data_ptr() % 16 == 0 else x.contiguous()


def source(x: Tensor, rows: int, columns: int, tma: bool) -> Any:
    """Returns what a kernel reads tiles of x [tokens, heads, width] through: head h begins at column h · stride."""
    if not tma:
        return x
    from triton.tools.tensor_descriptor import TensorDescriptor

    shape = [x.shape[0], (x.shape[1] - 1) * x.stride(1) + x.shape[2]]
    return TensorDescriptor(x, shape, [x.stride(0), 1], [rows, columns])


def constants(d0: int, d1: int, dv: int, tiles: Tiles, documents: bool) -> dict[str, Any]:
    """Returns the compile-time parameters and options that all kernels share."""
    return {
        "D0": d0, "D1": d1, "DV": dv, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "DOCUMENTS": documents,
        "TMA": tiles.tma, "STAGES": tiles.stages, "num_warps": tiles.warps,
    }  # fmt: skip


def forward(
    q: Tensor, k: tuple[Tensor, Tensor], v: Tensor, scale: float, first: Tensor | None, tiles: Tiles,
    out: Tensor, lse: Tensor, shift: int = 0, carry: bool = False,
) -> None:  # fmt: skip
    """Launches the forward kernel, which writes `out` and `lse`.

    Args:
        k: the keys' columns in two parts, [tokens, heads, …] each; the heads of a part may be one and the same.
        shift: key that the first query stands at.
        carry: whether `out` (float32) and `lse` hold the result over earlier keys, to go on with.
    """
    from ictx.kernels.attention import triton as kernels

    rows, heads, _ = q.shape
    (d0, d1), dv = widths(q.shape[-1]), v.shape[-1]
    blocks = -(-rows // tiles.block_m)
    q_1 = q[..., d0:] if d1 else q
    k_0, k_1 = k
    with turing.tensor_cores(dispatch.capability(q.device)):
        kernels.forward[(blocks * heads,)](
            source(q, tiles.block_m, d0, tiles.tma), source(q_1, tiles.block_m, d1 or d0, tiles.tma),
            source(k_0, tiles.block_n, d0, tiles.tma), source(k_1, tiles.block_n, d1 or d0, tiles.tma),
            source(v, tiles.block_n, dv, tiles.tma), out, lse, lse if first is None else first,
            *q.stride()[:2], *k_0.stride()[:2], *k_1.stride()[:2], *v.stride()[:2],
            rows, k_0.shape[0], shift, heads, blocks, scale * math.log2(math.e),
            CARRY=carry, AHEAD=tiles.ahead, **constants(d0, d1, dv, tiles, first is not None),
        )  # fmt: skip


@torch.library.custom_op(
    "ictx::mla_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float scale, Tensor? first, Tensor? end, int[] tiles) -> (Tensor, Tensor)",
)
def operation(
    q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor | None, end: Tensor | None, tiles: list[int]
) -> tuple[Tensor, Tensor]:
    """The Triton kernels as one operation, which torch.compile and selective recompute see.

    Returns the attended values, and the scores' log-sum-exp [heads, tokens].
    """
    q, k, v = readable(q), readable(k), readable(v)
    out, lse = _results(q, v)
    if len(q):
        d0, d1 = widths(q.shape[-1])
        parts = (k[..., :d0], k[..., d0:] if d1 else k)
        forward(q, parts, v, scale, first, AttentionConfig.of_numbers(tiles).forward, out, lse)
    return out, lse


@torch.library.custom_op(
    "ictx::mla_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, Tensor? first, "
    "Tensor? end, int[] tiles) -> (Tensor, Tensor, Tensor)",
)
def operation_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, first: Tensor | None,
    end: Tensor | None, tiles: list[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of q, k and v."""
    q, k, v, grad = readable(q), readable(k), readable(v), readable(grad)
    return gradients(grad, q, k, v, out, lse, scale, first, end, AttentionConfig.of_numbers(tiles))


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)


@operation.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor | None, end: Tensor | None, tiles: list[int]) -> Any:
    if dispatch.standing_for is not None:
        # Tensors without memory, but the launches are wanted.
        return operation._init_fn(q, k, v, scale, first, end, tiles)
    return _results(q, v)


@operation_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    if dispatch.standing_for is not None:
        return operation_backward._init_fn(grad, q, k, v, *rest)
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, scale, first, end, tiles = inputs
    ctx.save_for_backward(q, k, v, *output, first, end)
    ctx.rest = scale, tiles
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, first, end = ctx.saved_tensors
    scale, tiles = ctx.rest
    found = torch.ops.ictx.mla_attention_backward(grad, q, k, v, out, lse, scale, first, end, tiles)
    return *found, None, None, None, None


operation.register_autograd(_backward, setup_context=_keep)
OPERATION = torch.ops.ictx.mla_attention.default
"""What selective recompute knows the kernels by."""


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, first: Tensor | None,
    end: Tensor | None, config: AttentionConfig,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of q, k and v, contiguous."""
    from ictx.kernels.attention import backward_triton as kernels

    rows, heads, _ = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not rows:
        return dq, dk, dv
    # Whole tiles, so that kernels read them without masks.
    padded = -(-rows // 256) * 256
    sums = torch.empty(2, heads, padded, dtype=torch.float32, device=q.device)
    (d0, d1), value = widths(q.shape[-1]), v.shape[-1]
    kernels.row_sums[(padded // 64, heads)](
        out, grad, lse, sums, grad.stride(0), grad.stride(1), rows, padded, heads, DV=value, ROWS=64
    )
    documents = first is not None
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *grad.stride()[:2])

    def sources(tiles: Tiles) -> list[Any]:
        take = functools.partial(source, tma=tiles.tma)
        split = [(x, x[..., d0:] if d1 else x) for x in (q, k)]
        return [
            *(take(x, tiles.block_m, n) for x, n in zip(split[0], (d0, d1 or d0), strict=True)),
            *(take(x, tiles.block_n, n) for x, n in zip(split[1], (d0, d1 or d0), strict=True)),
            take(v, tiles.block_n, value), take(grad, tiles.block_m, value),
        ]  # fmt: skip

    with turing.tensor_cores(dispatch.capability(q.device)):
        tiles = config.keys_values
        blocks = -(-rows // tiles.block_n)
        kernels.keys_values[(blocks * heads,)](
            *sources(tiles), dk, dv, sums, lse if end is None else end, *strides,
            rows, padded, heads, blocks, scale, scale * math.log2(math.e),
            **constants(d0, d1, value, tiles, documents),
        )  # fmt: skip
        tiles = config.queries
        blocks = -(-rows // tiles.block_m)
        kernels.queries[(blocks * heads,)](
            *sources(tiles), dq, sums, lse if first is None else first, *strides,
            rows, padded, heads, blocks, scale, scale * math.log2(math.e),
            **constants(d0, d1, value, tiles, documents),
        )  # fmt: skip
    return dq, dk, dv
