"""`ictx bench train --check`: compares the gradients of two layouts of the ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ictx.bench.train_case import Case, random_batch
from ictx.data.loader import Batch
from ictx.parallel import Layout
from ictx.train.loss import next_token_loss, token_counts
from ictx.train.ranks import Ranks
from ictx.train.sharded import sharded_model

DOCUMENTS = 7
"""Documents per packed window, of random lengths."""


@dataclass
class Check:
    """Result of a comparison."""

    config: str
    sequence: int
    ranks: int
    cp: int
    reference_cp: int
    dtype: str
    documents: int
    """Documents per window."""
    loss: float
    reference_loss: float
    error: float
    """Norm of the difference of the whole gradients, relative to the norm of the reference."""
    worst: float
    """The same for the weight with the largest difference."""
    worst_weight: str


def compare(case: Case, ranks: Ranks, reference: Layout) -> Iterator[Check]:
    """Yields a check for windows of one document, and one for packed windows; every rank calls it.

    Neither layout replicates, so that a rank has the same shards of the gradients in both.
    """
    kind = ranks.device.type
    other = replace(ranks, context=reference.of(ranks.count).context(kind))
    windows = math.lcm(ranks.data_count, other.data_count)
    for documents in (1, DOCUMENTS):
        wanted, reference_loss = gradients(case, other, windows, documents)
        found, loss = gradients(case, ranks, windows, documents)
        errors = [(found[name].float() - wanted[name].float()).square().sum() for name in wanted]
        norms = [wanted[name].float().square().sum() for name in wanted]
        sums = ranks.total(*map(float, errors + norms))
        errors_of, norms_of = sums[: len(errors)], sums[len(errors) :]
        relative = [math.sqrt(a / b) if b else math.sqrt(a) for a, b in zip(errors_of, norms_of, strict=True)]
        worst = max(range(len(relative)), key=relative.__getitem__)
        yield Check(
            f"{case.config.num_hidden_layers} layers of {case.config.hidden_size}", case.sequence, ranks.count,
            ranks.part[1], other.part[1], case.dtype, documents, loss, reference_loss,
            math.sqrt(sum(errors_of) / sum(norms_of)), relative[worst], list(wanted)[worst],
        )  # fmt: skip


def gradients(case: Case, ranks: Ranks, windows: int, documents: int) -> tuple[dict[str, Tensor], float]:
    """Returns this rank's shards of the gradient of `windows` windows, on the CPU, and the loss of all ranks."""
    share = replace(case, batch=windows // ranks.data_count)
    model = sharded_model(case.config, case.loop, ranks)
    batch = packed(random_batch(share, ranks), share, ranks, documents)
    loss, means = next_token_loss(model, batch, documents > 1, ranks.sums([token_counts(model, batch)]))
    (loss * ranks.count).backward()  # type: ignore[no-untyped-call]
    shards = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {name: shard.to_local().cpu() for name, shard in shards.items()}, ranks.total(float(means["loss"]))[0]  # type: ignore[attr-defined]


def packed(batch: Batch, case: Case, ranks: Ranks, documents: int) -> Batch:
    """Returns a rank's part with `documents` documents per window, cut at the same positions in all windows."""
    cuts = torch.randperm(case.sequence - 1, generator=torch.Generator().manual_seed(1))[: documents - 1] + 1
    starts = torch.zeros(case.sequence, dtype=torch.int64)
    starts[cuts] = 1
    ids, places = starts.cumsum(0), torch.arange(case.sequence)
    firsts = torch.where(starts.bool(), places, 0).cummax(0).values
    whole = [x.expand(case.batch, -1) for x in (places - firsts, ids)]
    own = [x.view(case.batch, ranks.part[1], -1)[:, ranks.part[0]].to(ranks.device) for x in whole]
    return Batch(batch.input_ids, batch.labels, *own)
