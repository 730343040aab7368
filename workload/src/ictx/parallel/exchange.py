"""Communication of context-parallel ranks: all-gather of latents, all-to-all of queries and results (tokens ↔ heads).

Heads are exchanged in parts: during the attention of one part, the next part's queries and the previous part's results
are transferred in a separate stream. For windows so long that memory is scarce and exchange time negligible, parts do
not overlap.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ictx.parallel.communication import COLLECTIVES

AT_ONCE = 1 << 20
"""Maximum tokens × heads with expanded keys and values: all heads up to 65,536 tokens, one at a million (3 GB)."""
# PyTorch 2.13 deprecates the older names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

GROUPS: dict[str, dist.ProcessGroup] = {}
"""Process groups by name: operations of torch.library accept no groups."""
_streams: dict[torch.device, torch.cuda.Stream] = {}


def gather(x_bs: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns the parts of all ranks side by side along the second axis."""
    parts = x_bs.new_empty(group.size(), *x_bs.shape)
    with COLLECTIVES.timed():
        _all_gather(parts.flatten(0, 1), x_bs.contiguous(), group)
    return parts.transpose(0, 1).flatten(1, 2)


def scatter_sum(x_bt: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Returns this rank's part along the second axis of the sum over ranks."""
    parts = x_bt.view(len(x_bt), group.size(), -1, x_bt.shape[-1]).transpose(0, 1).contiguous()
    total = torch.empty_like(parts[0])
    with COLLECTIVES.timed():
        _reduce_scatter(total, parts.flatten(0, 1), group=group)
    return total


def overlapped(heads: int, tokens: int) -> bool:
    """Whether exchange and attention of parts overlap: if all heads of a rank would fit in memory at once."""
    return heads * tokens <= AT_ONCE


def heads_at_once(heads: int, tokens: int) -> int:
    """Returns the number of a rank's heads per part: as `AT_ONCE` allows, and at most half of them."""
    return max(min(AT_ONCE // tokens, -(-heads // 2)), 1)


class Exchange:
    """A running all-to-all: part r of a tensor goes to rank r."""

    def __init__(self, parts: Tensor, group: dist.ProcessGroup) -> None:
        """Starts after the work queued in the current stream; on a GPU, later work of that stream overlaps with it."""
        # Keep references until the result is taken: the memory was allocated in the current stream.
        self._sent, self._result = parts.contiguous(), torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
        if not parts.is_cuda:
            self._run(group)
            return
        device = parts.device
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        stream = _streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._run(group)
            self._over = stream.record_event()

    def _run(self, group: dist.ProcessGroup) -> None:
        with COLLECTIVES.timed():
            dist.all_to_all_single(self._result, self._sent, group=group)

    def take(self) -> Tensor:
        """Returns the received parts, one per rank; the current stream waits for them."""
        if self._sent.is_cuda:
            torch.cuda.current_stream(self._sent.device).wait_event(self._over)
        return self._result


class Heads:
    """State of an attention call: latents of all tokens, and this rank's heads in parts."""

    def __init__(self, q_bshd: Tensor, latent_bse: Tensor, weight: Tensor, group: str) -> None:
        self.group = GROUPS[group]
        self.ranks, self.rank = self.group.size(), self.group.rank()
        self.batch, self.tokens, heads, width = q_bshd.shape
        self.latent_width = weight.shape[1]
        self.nope = width - (latent_bse.shape[-1] - self.latent_width)
        self.heads = heads // self.ranks
        # (rank, head of the rank, columns, latent)
        self.weight = weight.view(self.ranks, self.heads, -1, self.latent_width)
        self.value = self.weight.shape[2] - self.nope
        whole = gather(latent_bse, self.group).flatten(0, 1)
        self.latent_nc, self.k_rope_nr = whole[:, : self.latent_width], whole[:, self.latent_width :]
        self.overlapped = overlapped(self.heads, len(self.latent_nc))
        self._leaving: tuple[Exchange, slice, Tensor] | None = None

    def arriving(self, *tensors_bshd: Tensor) -> Iterator[tuple[slice, list[Exchange]]]:
        """Yields each part of this rank's heads, with the exchange that receives it for each tensor of all heads.

        `taken` returns the result of an exchange. The next part is transferred while one is processed.
        """
        step = heads_at_once(self.heads, len(self.latent_nc))
        parts = [slice(first, min(first + step, self.heads)) for first in range(0, self.heads, step)]
        coming: list[Exchange] = []
        for number, part in enumerate(parts, 1):
            now = coming or [self._sent(x, part) for x in tensors_bshd]
            ahead = self.overlapped and number < len(parts)
            coming = [self._sent(x, parts[number]) for x in tensors_bshd] if ahead else []
            yield part, now

    def taken(self, arrived: Exchange) -> Tensor:
        """Returns the received tensor, [tokens of all ranks, heads of the part, width]."""
        return arrived.take().transpose(0, 1).flatten(0, 2)

    def leave(self, x_nhd: Tensor, part: slice, out_bshd: Tensor) -> None:
        """Sends all tokens of a part of the heads; `out_bshd`, this rank's tokens with all heads, is filled later."""
        x_brshd = x_nhd.view(self.batch, self.ranks, self.tokens, *x_nhd.shape[1:])
        leaving = Exchange(x_brshd.transpose(0, 1), self.group), part, out_bshd
        self.settle()
        self._leaving = leaving
        if not self.overlapped:
            self.settle()

    def settle(self) -> None:
        """Waits for the last `leave` and writes its result."""
        if self._leaving:
            exchange, part, out_bshd = self._leaving
            self._by_rank(out_bshd)[:, :, :, part] = exchange.take().permute(1, 2, 0, 3, 4)
        self._leaving = None

    def _sent(self, x_bshd: Tensor, part: slice) -> Exchange:
        return Exchange(self._by_rank(x_bshd)[:, :, :, part].permute(2, 0, 1, 3, 4), self.group)

    def _by_rank(self, x_bshd: Tensor) -> Tensor:
        """Returns a view of shape (batch, sequence, rank, head of the rank, width)."""
        return x_bshd.view(self.batch, self.tokens, self.ranks, self.heads, -1)

    def keys_values(self, part: slice) -> tuple[Tensor, Tensor]:
        """Returns keys and values of all tokens, [tokens, heads of the part, …]."""
        tokens, count = len(self.latent_nc), part.stop - part.start
        kv = (self.latent_nc @ self.weight[self.rank, part].flatten(0, 1).T).view(tokens, count, -1)
        k_nope, v = torch.split(kv, [self.nope, self.value], -1)
        return torch.cat([k_nope, self.k_rope_nr[:, None].expand(-1, count, -1)], -1), v
