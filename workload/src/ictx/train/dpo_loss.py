"""The loss of preference optimization on pairs of answers, as a batch's share of a step: see `ictx.train.loss`."""

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
    """Pairs of one rank: rows of prompt and answer, first all chosen answers, then all rejected ones."""

    input_ids: Tensor
    """int64 (2 · pairs, sequence), padded after the answer."""
    labels: Tensor
    """int64, same shape: each position's next token if it belongs to the answer, else -1."""
    reference: Tensor
    """The reference model's log-probability of each row's answer, float32 (2 · pairs)."""
    lengths: Tensor
    """Tokens of each row's answer, int64 (2 · pairs)."""

    def to(self, device: torch.device) -> PairBatch:
        """Returns the batch on a device."""
        return PairBatch(*(x.to(device) for x in (self.input_ids, self.labels, self.reference, self.lengths)))

    def part(self, place: int, parts: int) -> PairBatch:
        """Returns part `place` of `parts` equal parts of each row's tokens, with the values of whole answers."""
        ids, labels = (x.view(len(x), parts, -1)[:, place] for x in (self.input_ids, self.labels))
        return replace(self, input_ids=ids, labels=labels)


def answer_log_probs(model: Transformer, batch: PairBatch) -> Tensor:
    """Returns the log-probability of each row's answer, (2 · pairs), equal on all ranks of a context.

    A rank's gradient covers its own tokens. No mask is needed: padding comes last, and attention is causal.
    """
    own: Tensor = model(batch.input_ids, labels=batch.labels, each=True).sum(1)
    context = model.context
    return own + (context.mean(own.detach()) * context.count - own.detach()) if context else own


def pair_losses(ratios: Tensor, lengths: Tensor, config: PreferenceConfig) -> Tensor:
    """Returns each pair's loss, (pairs).

    Args:
        ratios: log-probability of each answer minus the reference's, (2 · pairs), chosen answers first.
        lengths: tokens of each answer, (2 · pairs).
    """
    chosen, rejected = ratios.chunk(2)
    if config.loss == "ipo":
        # arXiv:2310.12036, equation 17; with means over tokens as in TRL, which its authors confirmed.
        chosen, rejected = (ratios / lengths).chunk(2)
        return (chosen - rejected - 1 / (2 * config.beta)).square()
    margin = config.beta * (chosen - rejected)
    # arXiv:2305.18290, equation 7; arXiv:2305.10425, section 2.
    return -F.logsigmoid(margin) if config.loss == "sigmoid" else torch.relu(1 - margin)


def pair_counts(model: Transformer, batch: PairBatch) -> Counts:
    """Returns the number of `pairs` of a batch. Ranks of a context share the pairs: each counts a fraction."""
    pairs = len(batch.lengths) / 2 / (model.context.count if model.context else 1)
    return {"pairs": torch.full((), pairs, dtype=torch.float64, device=batch.lengths.device)}


def preference_loss(model: Transformer, batch: PairBatch, config: PreferenceConfig, totals: Counts) -> Loss:
    """Returns a batch's share of the mean loss over pairs, and of the mean rewards with TRL's metric names.

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
    # Metrics are equal on the ranks of a context, so each contributes a fraction; gradients cover only own tokens.
    pairs, parts = totals["pairs"], model.context.count if model.context else 1
    return losses.sum() / pairs, {name: value / parts / pairs for name, value in sums.items()}
