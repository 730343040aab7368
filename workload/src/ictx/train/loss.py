"""The loss of a batch as its share of a step's: ranks and micro-batches with fewer tokens weigh less."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ictx.data.loader import Batch
from ictx.model import Transformer

Counts = dict[str, Tensor]
"""How many of what parts of a loss are means over, by name."""
Loss = tuple[Tensor, dict[str, Tensor]]
"""A batch's share of a step's loss to differentiate, and of what is recorded."""
OVER = {"mtp_loss": "further", "balance_loss": "windows"}
"""What the parts that training adds are means over; all else is one over `tokens`."""


def token_counts(model: Transformer, batch: Batch) -> Counts:
    """Returns a batch's `tokens` with a label, its `windows`, and the `further` labels of a model that predicts them.

    Of ranks that share out windows each counts these: it has as large a part of their balance as the others.
    """
    labels = batch.labels
    counts = {"tokens": (labels >= 0).sum(), "windows": torch.full((), len(labels), device=labels.device)}
    if len(model.mtp):
        counts["further"] = (model.further_labels(labels) >= 0).sum()
    return counts


def cross_entropy(model: Transformer, batch: Batch, mask_documents: bool) -> Tensor:
    """Returns the mean cross-entropy of a batch, in nats, with the z-loss if a gradient is wanted (`Transformer`).

    Args:
        mask_documents: whether a token sees its own document only. If it sees the others, positions count through:
            with those of the documents, distances between two of them would mean nothing.
    """
    documents = {"position_ids": batch.position_ids, "document_ids": batch.document_ids} if mask_documents else {}
    return cast(Tensor, model(batch.input_ids, labels=batch.labels, **documents))


def next_token_loss(model: Transformer, batch: Batch, mask_documents: bool, totals: Counts) -> Loss:
    """Returns a batch's share of the cross-entropy of each token's next one, and of what training adds to it.

    Summed over the batches that `totals` counts, `loss` is the cross-entropy alone, in nats; `mtp_loss`,
    `balance_loss` and `z_loss` are what is added, each a mean over its own, and `auxiliary_loss` all of these.

    Args:
        mask_documents: as `cross_entropy` takes it.
        totals: `token_counts` of all batches of the step on all ranks.
    """
    mean = cross_entropy(model, batch, mask_documents)
    share = {name: count / totals[name].clamp(min=1) for name, count in token_counts(model, batch).items()}
    total = mean * share["tokens"]
    if not torch.is_grad_enabled():
        return total, {"loss": total}
    added = {name: loss * share[OVER[name]] for name, loss in model.auxiliary_losses().items()}
    whole, metrics = sum(added.values(), total), {"loss": total}
    if model.z_loss_weight and model.z_loss is not None:
        added["z_loss"] = model.z_loss * share["tokens"]
        metrics["loss"] = total - added["z_loss"]
    if added:
        metrics |= added | {"auxiliary_loss": torch.stack([*added.values()]).sum()}
    return whole, {name: value.detach() for name, value in metrics.items()}
