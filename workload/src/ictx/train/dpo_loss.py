"""The loss of preference optimization on pairs of answers, as a batch's share of a step's: see `ictx.train.loss`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ictx.model import Transformer
from ictx.train.dpo_config import PreferenceConfig
from ictx.train.loss import Counts, Loss


@dataclass(frozen=True)
class PairBatch:
    """Pairs of one rank: rows of all chosen answers, then of all rejected ones, each behind its prompt."""

    input_ids: Tensor
    """int64 (2 · pairs, sequence), padded behind the answer."""
    labels: Tensor
    """Each position's next token where that is of the answer, else -1; of the same shape."""
    reference: Tensor
    """The reference model's log-probability of each row's answer, float32 (2 · pairs)."""
    lengths: Tensor
    """Tokens of each row's answer, int64 (2 · pairs)."""

    def to(self, device: torch.device) -> PairBatch:
        """Returns the batch on a device."""
        return PairBatch(*(x.to(device) for x in (self.input_ids, self.labels, self.reference, self.lengths)))

    def part(self, place: int, parts: int) -> PairBatch:
        """Returns one of equal parts of each row's tokens; what is known of whole answers stays."""
        ids, labels = (x.view(len(x), parts, -1)[:, place] for x in (self.input_ids, self.labels))
        return replace(self, input_ids=ids, labels=labels)


def answer_log_probs(model: Transformer, batch: PairBatch) -> Tensor:
    """Returns the log-probability of each row's answer, (2 · pairs), the same on all ranks of a context.

    A rank's gradient is of its own tokens. Causal attention needs no mask: padding stands behind what counts.
    """
    own: Tensor = model(batch.input_ids, labels=batch.labels, each=True).sum(1)
    context = model.context
    return own + (context.mean(own.detach()) * context.count - own.detach()) if context else own


def pair_losses(ratios: Tensor, lengths: Tensor, config: PreferenceConfig) -> Tensor:
    """Returns each pair's loss, (pairs).

    Args:
        ratios: log-probability of each answer less the reference's, (2 · pairs): the chosen ones first.
        lengths: tokens of each answer.
    """
    chosen, rejected = ratios.chunk(2)
    if config.loss == "ipo":
        # arXiv:2310.12036, equation 17; of means over tokens as in TRL, where the authors confirmed it.
        chosen, rejected = (ratios / lengths).chunk(2)
        return (chosen - rejected - 1 / (2 * config.beta)).square()
    margin = config.beta * (chosen - rejected)
    # arXiv:2305.18290, equation 7; arXiv:2305.10425, section 2.
    return -F.logsigmoid(margin) if config.loss == "sigmoid" else torch.relu(1 - margin)


def pair_counts(model: Transformer, batch: PairBatch) -> Counts:
    """Returns how many `pairs` a batch has. Ranks of a context have the same ones: each counts a part of them."""
    pairs = len(batch.lengths) / 2 / (model.context.count if model.context else 1)
    return {"pairs": torch.full((), pairs, dtype=torch.float64, device=batch.lengths.device)}


def preference_loss(model: Transformer, batch: PairBatch, config: PreferenceConfig, totals: Counts) -> Loss:
    """Returns a batch's share of the mean loss of pairs, and of mean rewards by the names that TRL has for them.

    Args:
        totals: `pair_counts` of all batches of the step on all ranks.
    """
    ratios = answer_log_probs(model, batch) - batch.reference
    losses = pair_losses(ratios, batch.lengths, config)
    chosen, rejected = (config.beta * ratios.detach()).chunk(2)
    sums = {
        "loss": losses.detach().sum(),
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": (chosen > rejected).float().sum(),
    }
    # Ranks of a context record a part of what all of them have; their gradients are of their own tokens alone.
    pairs, parts = totals["pairs"], model.context.count if model.context else 1
    return losses.sum() / pairs, {name: value / parts / pairs for name, value in sums.items()}
