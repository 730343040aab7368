"""The loss of a batch as its share of a step's loss, weighted by its number of tokens."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ictx.data.loader import Batch
from ictx.model import Transformer

Counts = dict[str, Tensor]
"""Denominators of a loss's parts, by name."""
Loss = tuple[Tensor, dict[str, Tensor]]
"""A batch's share of a step's loss, with gradient, and its shares of the metrics."""
OVER = {"mtp_loss": "further", "balance_loss": "windows"}
"""Denominators of auxiliary losses; all others are means over `tokens`."""


def token_counts(model: Transformer, batch: Batch) -> Counts:
    """Returns a batch's numbers of `tokens` with a label, `windows`, and `further` labels of multi-token prediction.

    Ranks of a context all count the windows that they share, since each contributes equally to the balance loss.
    """
    labels = batch.labels
    counts = {"tokens": (labels >= 0).sum(), "windows": torch.full((), len(labels), device=labels.device)}
    if len(model.mtp):
        counts["further"] = (model.further_labels(labels) >= 0).sum()
    return counts


def cross_entropy(model: Transformer, batch: Batch, mask_documents: bool) -> Tensor:
    """Returns the mean cross-entropy of a batch in nats, plus the z-loss if gradients are enabled (`Transformer`).

    Args:
        mask_documents: restrict attention to a token's own document, with positions relative to it. Otherwise
            positions are those in the window, since relative positions across documents would be meaningless.
    """
    documents = {"position_ids": batch.position_ids, "document_ids": batch.document_ids} if mask_documents else {}
    return cast(Tensor, model(batch.input_ids, labels=batch.labels, **documents))


def next_token_loss(model: Transformer, batch: Batch, mask_documents: bool, totals: Counts) -> Loss:
    """Returns a batch's share of the next-token cross-entropy plus auxiliary losses, and its shares of the metrics.

    Summed over the batches of `totals`, `loss` is the cross-entropy alone, in nats; `mtp_loss`, `balance_loss` and
    `z_loss` are the auxiliary losses, and `auxiliary_loss` is their sum.

    Args:
        mask_documents: see `cross_entropy`.
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
