"""The part of `ictx kernels bench` for `mla_attention` and `mla_prefill`.

Inputs are random, and each set is several times the size of the L2 cache. A time is the median over calls between two
events: calls take milliseconds, so that launch overhead is hidden. Peers get values padded to the width of the keys if
they require it, and in prefill the whole expanded cache at once.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from ictx.kernels import dispatch, layout
from ictx.kernels.attention import flash4
from ictx.kernels.attention.op import mla_attention
from ictx.kernels.attention.tuning import attention_config
from ictx.kernels.prefill.op import mla_prefill

HEADS = 16
SCALE = 192**-0.5
PAGE = 64


@dataclass
class Row:
    """One measurement."""

    case: str
    implementation: str
    milliseconds: float | None
    share_of_product: float | None
    """Operations of the attention divided by the time, as a share of the measured product rate."""
    note: str = ""


def median_time(call: Callable[[], object], repeats: int = 9) -> float:
    """Returns the median time of a call in seconds."""
    for _ in range(2):
        call()
    measured = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        measured.append(begin.elapsed_time(end) * 1e-3)
    return float(sorted(measured)[repeats // 2])


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Returns normally distributed numbers on the GPU."""
    return torch.randn(*shape, dtype=dtype, device="cuda")


@functools.cache
def compiled_flex() -> Any:
    """Returns FlexAttention, compiled."""
    return torch.compile(flex_attention)


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
    """PyTorch's attention with one back end."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, scale=SCALE, **mask)


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """vLLM's build of FlashAttention 3 on one sequence, [tokens, heads, width]. It has no backward pass."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    ends = [torch.tensor([0, len(x)], dtype=torch.int32, device="cuda") for x in (q, k)]
    result: Tensor = flash_attn_varlen_func(
        q, k, v, len(q), ends[0], len(k), ends[1], softmax_scale=SCALE, causal=True, fa_version=3
    )
    return result


def training(tokens: int) -> dict[str, tuple[Callable[[], Tensor], list[Tensor], Tensor]]:
    """Returns each implementation's forward function, inputs with gradients, and gradient of the output.

    The list of inputs is empty if an implementation has no backward pass.
    """
    q, k, v, grad = (random(tokens, HEADS, width) for width in (192, 192, 128, 128))
    ours = [x.detach().requires_grad_() for x in (q, k, v)]
    q_b, k_b, v_b, grad_b = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v, grad))
    fourth = [x.detach().requires_grad_() for x in (q, k, v)]
    as_is = [x.detach().requires_grad_() for x in (q_b, k_b, v_b)]
    padded = [*as_is[:2], F.pad(v_b, (0, 64)).requires_grad_()]
    padded_grad = F.pad(grad_b, (0, 64))
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device="cuda")
    # With an explicit configuration, `mla_attention` uses our kernel, not a library.
    tuned = attention_config(dispatch.capability(q.device))
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    return {
        "ictx": (lambda: mla_attention(ours[0], ours[1], ours[2], SCALE, config=tuned), ours, grad),
        "sdpa flash, V padded": (lambda: sdpa(flash, *padded, is_causal=True), padded, padded_grad),
        "sdpa cudnn, V padded": (lambda: sdpa(cudnn, *padded, is_causal=True), padded, padded_grad),
        "sdpa cudnn, V as it is": (lambda: sdpa(cudnn, *as_is, is_causal=True), as_is, grad_b),
        "flex": (lambda: compiled_flex()(*as_is, block_mask=mask, scale=SCALE), as_is, grad_b),
        "flashattention 3": (lambda: flash_attention_3(q, k, v), [], grad),
        "flashattention 4": (lambda: flash4.attend(fourth[0], fourth[1], fourth[2], SCALE, 1, None), fourth, grad),
    }


def cudnn_in_two(q: Tensor, k: Tensor, v: Tensor, prefix: int) -> Tensor:
    """cuDNN's attention to a prefix and among the new tokens, joined: its causal mask supports no offset."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    parts = [
        attend(q, k[:, :, part], v[:, :, part], None, True, 0.0, causal, False, scale=SCALE)[:2]
        for part, causal in ((slice(0, prefix), False), (slice(prefix, None), True))
    ]
    lse = torch.stack([part[1].view(*q.shape[:3], 1) for part in parts])
    weight = lse.softmax(0)
    out: Tensor = parts[0][0] * weight[0].to(q.dtype) + parts[1][0] * weight[1].to(q.dtype)
    return out


def prefill(new: int, prefix: int) -> dict[str, Callable[[], Tensor]]:
    """Returns every implementation; all start from the same latent cache and queries."""
    length = new + prefix
    q, cache = random(new, HEADS, 192), random(length // PAGE, PAGE, layout.ROW)
    weight = random(HEADS * 256, layout.LATENT) * layout.LATENT**-0.5
    table = torch.arange(length // PAGE, dtype=torch.int32, device="cuda")
    q_b = q.transpose(0, 1)[None].contiguous()

    def keys_and_values() -> tuple[Tensor, Tensor]:
        rows = cache.view(length, layout.ROW)
        kv = F.linear(rows[:, : layout.LATENT], weight).view(length, HEADS, 256)
        k = torch.cat([kv[..., :128], rows[:, None, layout.LATENT :].expand(-1, HEADS, -1)], -1)
        return k, kv[..., 128:]

    def expanded(width: int) -> tuple[Tensor, Tensor, Tensor]:
        k, v = keys_and_values()
        return q_b, k.transpose(0, 1)[None], F.pad(v, (0, width - 128)).transpose(0, 1)[None]

    from torch.nn.attention.bias import causal_lower_right

    corner = causal_lower_right(new, length)
    mask = create_block_mask(lambda b, h, i, j: i + prefix >= j, None, None, new, length, device="cuda")
    return {
        "ictx": lambda: mla_prefill(q, cache, length, weight, SCALE, table),
        "sdpa flash, V padded": lambda: sdpa(SDPBackend.FLASH_ATTENTION, *expanded(192), attn_mask=corner),
        "sdpa cudnn, V padded": lambda: cudnn_in_two(*expanded(192), prefix),
        "sdpa cudnn, V as it is": lambda: cudnn_in_two(*expanded(128), prefix),
        "flex": lambda: compiled_flex()(*expanded(128), block_mask=mask, scale=SCALE),
        "flashattention 3": lambda: flash_attention_3(q, *keys_and_values()),
    }


def measure(rate: float, quick: bool, peers: bool = True) -> list[Row]:
    """Returns the times of all implementations, or only of ours; `rate`: product rate in operations per second."""
    rows = []

    def take(case: str, name: str, work: float, call: Callable[[], object]) -> None:
        try:
            seconds = median_time(call)
            row = Row(case, name, seconds * 1e3, work / seconds / rate)
        except ImportError:
            row = Row(case, name, None, None, "not installed")
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row = Row(case, name, None, None, str(error).splitlines()[0][:100])
        rows.append(row)
        result = (
            f"{row.milliseconds:8.2f} ms {100 * (row.share_of_product or 0):5.1f} %" if row.milliseconds else row.note
        )
        print(f"{case:28} {name:22} {result}", flush=True)
        torch.cuda.empty_cache()

    tokens = 4096 if quick else 32768
    # 2 · 192 operations per score and 2 · 128 per value; the gradient takes 2.6 times as many.
    work = 640 * HEADS * tokens * (tokens + 1) / 2
    for name, (call, inputs, grad) in training(tokens).items():
        if name != "ictx" and not peers:
            continue
        with torch.no_grad():
            take(f"forward {tokens}", name, work, call)
        if inputs:
            take(
                f"forward and backward {tokens}", name, 3.6 * work,
                lambda call=call, inputs=inputs, grad=grad: torch.autograd.grad(call(), inputs, grad),  # type: ignore[misc]
            )  # fmt: skip
    new, prefix = (512, 7680) if quick else (8192, 122880)
    work = 640 * HEADS * new * (prefix + (new + 1) / 2) + 2 * HEADS * 256 * layout.LATENT * (new + prefix)
    for name, attend in prefill(new, prefix).items():
        if name != "ictx" and not peers:
            continue
        with torch.no_grad():
            take(f"prefill {new} on {prefix}", name, work, attend)
    return rows


def save(rows: list[Row], out: Path) -> None:
    """Writes `attention.csv`."""
    with (out / "attention.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
