"""The loss of a batch as a sum and a count: ranks and micro-batches with fewer tokens weigh less."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ictx.data.loader import Batch
from ictx.model import Transformer

Loss = tuple[Tensor, Tensor, dict[str, Tensor]]
"""A sum over tokens to differentiate, how many tokens it is of, and further sums over these tokens to record."""


def next_token_loss(model: Transformer, batch: Batch, mask_documents: bool) -> Loss:
    """Returns the cross-entropy, in nats, of each token's next one: its sum is `loss` among what is recorded.

    What is differentiated also has what training adds to it (`auxiliary_loss`), weighted by the same tokens.

    Args:
        mask_documents: whether a token sees its own document only. If it sees the others, positions count through:
            with those of the documents, distances between two of them would mean nothing.
    """
    documents = {"position_ids": batch.position_ids, "document_ids": batch.document_ids} if mask_documents else {}
    mean = cast(Tensor, model(batch.input_ids, labels=batch.labels, **documents))
    count = (batch.labels >= 0).sum()
    # Of ranks that share out windows each has an equal part of what is added, whichever labels are its own.
    weight = model.context.mean(count.float()) if model.context else count
    total, auxiliary = mean * count, model.auxiliary_loss() * weight
    sums = {"loss": total.detach()}
    if auxiliary.requires_grad:
        sums["auxiliary_loss"] = auxiliary.detach()
    return total + auxiliary, count, sums
