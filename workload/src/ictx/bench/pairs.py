"""`ictx bench links`: bandwidth between pairs of nodes and of all nodes, correctness of sums, and clock offsets."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ictx.bench.links import seconds
from ictx.errors import UserError
from ictx.train.ranks import Ranks

EXCHANGES = 20
"""Comparisons of two clocks; the one with the shortest round trip is used."""


@dataclass
class Links:
    """Result of `ictx bench links`; bandwidths are bus bandwidths of an all-reduce in bytes/s."""

    backend: str
    ranks: int
    size_bytes: int
    nodes: list[str]
    together: float
    """Bandwidth of all ranks of all nodes."""
    inside: dict[str, float]
    """Bandwidth of the ranks of one node, by its name; nodes with one rank are omitted."""
    pairs: list[tuple[str, str, float]]
    """Bandwidth of all ranks of two nodes, with their names."""
    clocks: dict[str, tuple[float, float]]
    """Offset of a node's clock from the first node's, and the error bound, in seconds."""


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Yields rounds of disjoint pairs of `count` nodes that together contain all pairs (the circle method)."""
    ring = list(range(count + count % 2))
    for _ in range(len(ring) - 1):
        met = [(min(pair), max(pair)) for pair in zip(ring[: len(ring) // 2], reversed(ring), strict=False)]
        yield sorted(pair for pair in met if pair[1] < count)
        ring = [ring[0], ring[-1], *ring[1:-1]]


def measure(ranks: Ranks, size: int, times: int) -> Links:
    """Measures an all-reduce of `size` bytes; the pairs of a round run concurrently.

    Raises UserError on all ranks for a single rank, and for a wrong sum, naming the nodes that computed it.
    """
    if ranks.count == 1:
        raise UserError("there is only one rank: start `ictx bench links` with torchrun on several")
    names: list[str] = [""] * ranks.count
    dist.all_gather_object(names, os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    nodes = list(dict.fromkeys(names))
    members = {node: [rank for rank, name in enumerate(names) if name == node] for node in nodes}
    data = torch.empty(size // 4, dtype=torch.float32, device=ranks.device)

    together = _measured(data, [(*nodes,)], members, times)
    inside = _measured(data, [(node,) for node in nodes if len(members[node]) > 1], members, times)
    pairs: dict[tuple[str, ...], float] = {}
    for partners in rounds(len(nodes)):
        pairs |= _measured(data, [(nodes[one], nodes[other]) for one, other in partners], members, times)
    return Links(
        dist.get_backend(), ranks.count, len(data) * 4, nodes, together[(*nodes,)],
        {node: found for (node,), found in inside.items()},
        [(one, other, found) for (one, other), found in pairs.items()],
        _clocks(ranks, {node: members[node][0] for node in nodes}),
    )  # fmt: skip


def _measured(
    data: torch.Tensor, groups: list[tuple[str, ...]], members: dict[str, list[int]], times: int
) -> dict[tuple[str, ...], float]:
    """Returns the bus bandwidth of each group of nodes, on every rank; the groups run concurrently."""
    if not groups:
        return {}
    rank = dist.get_rank()
    lists = [[member for node in group for member in members[node]] for group in groups]
    made = [dist.new_group(each) for each in lists]
    mine = [number for number, each in enumerate(lists) if rank in each]
    took, right = 0.0, True
    dist.barrier()
    for number in mine:
        group = made[number]
        data.fill_(float(lists[number].index(rank) + 1))
        dist.all_reduce(data, group=group)
        count = len(lists[number])
        right = bool((data == count * (count + 1) / 2).all())
        data.zero_()
        took = seconds(lambda group=group: dist.all_reduce(data, group=group), data.device, times)  # type: ignore[misc]
    found: list[tuple[float, bool]] = [(0.0, True)] * dist.get_world_size()
    dist.all_gather_object(found, (took, right))
    for number in mine:
        dist.destroy_process_group(made[number])
    result = {}
    for nodes, each in zip(groups, lists, strict=True):
        if not all(found[member][1] for member in each):
            raise UserError(f"an all-reduce of {', '.join(nodes)} has a wrong sum: take these nodes out of service")
        share = 2 * (len(each) - 1) / len(each)
        result[nodes] = share * data.nbytes / max(found[member][0] for member in each)
    return result


def _clocks(ranks: Ranks, first: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Returns each node's offset and its bound, as NTP computes them (RFC 5905, section 8), on the first rank."""
    group = dist.new_group(backend="gloo")
    found = {}
    message = torch.zeros(1, dtype=torch.float64)
    for node, other in first.items():
        if other == 0:
            continue
        heard = []
        for _ in range(EXCHANGES):
            if ranks.rank == 0:
                sent = time.time()
                dist.send(message, other, group)
                dist.recv(message, other, group)
                way = time.time() - sent
                heard.append((way / 2, float(message) - sent - way / 2))
            elif ranks.rank == other:
                dist.recv(message, 0, group)
                message.fill_(time.time())
                dist.send(message, 0, group)
        if heard:
            bound, offset = min(heard)
            found[node] = (offset, bound)
    return found


def lines(links: Links) -> Iterator[str]:
    """Yields the output of `ictx bench links`; GB are 10^9 bytes."""
    yield f"{links.ranks} ranks on {len(links.nodes)} nodes, {links.backend}, all-reduce of {links.size_bytes:,} bytes"
    yield f"all      {links.together * 1e-9:10.3f} GB/s"
    yield from (f"inside   {found * 1e-9:10.3f} GB/s  {node}" for node, found in links.inside.items())
    yield from (f"pair     {found * 1e-9:10.3f} GB/s  {one} {other}" for one, other, found in sorted(links.pairs))
    yield from (
        f"clock    {offset * 1e3:+10.3f} ms ± {bound * 1e3:.3f}  {node}"
        for node, (offset, bound) in links.clocks.items()
    )
