"""Pretraining: next-token prediction over a prepared corpus, from random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ictx.data.loader import Batch, Batches
from ictx.data.mix import opened
from ictx.errors import UserError
from ictx.model import Transformer
from ictx.settings import build
from ictx.train import run
from ictx.train.config import CorpusConfig, PretrainConfig
from ictx.train.loss import Counts, Loss, next_token_loss, token_counts
from ictx.train.prepared import checked
from ictx.train.ranks import Ranks
from ictx.train.validation import Validation


class OnCorpus:
    """Common part of the stages that train next-token prediction on a corpus."""

    config: CorpusConfig

    @property
    def data_dir(self) -> Path:
        """Folder of the corpus, or of the first corpus of a mix."""
        return self.config.data.dirs[0]

    def batches(self, ranks: Ranks) -> Batches:
        """Returns the packed corpus in the run's order. Raises UserError if it does not match the settings."""
        loop = self.config.train
        folders, corpora = checked(self.config.data), self.config.data
        data, validation = opened(folders, corpora, "train"), opened(folders, corpora, "validation")
        if data.meta["vocab_size"] != self.config.model.vocab_size:
            raise UserError(
                f"{self.data_dir} was prepared with vocab_size {data.meta['vocab_size']}, but model.vocab_size is "
                f"{self.config.model.vocab_size}: prepare the corpus with this configuration"
            )
        windows = validation.windows(loop.sequence_length)
        if not windows:
            raise UserError(
                f"{self.data_dir} has no validation window of {loop.sequence_length} tokens: raise "
                "data.validation_share or prepare a larger corpus"
            )

        def read(numbers: Sequence[int]) -> Batch:
            return Batch.of([validation.window(number, loop.sequence_length) for number in numbers])

        self.validation = Validation(windows, read, loop, ranks)
        self.unigram_entropy: float = validation.meta["unigram_entropy"]
        self.fingerprint: str = data.meta["fingerprint"]
        self.end_of_text: str = data.meta["end_of_text"][1]
        shares = ranks.data_rank, ranks.data_count
        return Batches(data, loop.sequence_length, loop.batch_size, *shares, loop.seed, ranks.part)

    def counts(self, model: Transformer, batch: Batch) -> Counts:
        """Returns the denominators of a batch's losses."""
        return token_counts(model, batch)

    def loss(self, model: Transformer, batch: Batch, totals: Counts) -> Loss:
        """Returns the next-token cross-entropy."""
        return next_token_loss(model, batch, self.config.train.mask_documents, totals)

    def examine(self, model: Transformer) -> dict[str, float]:
        """Returns the loss on validation data, and the largest activations."""
        return self.validation.examine(model, self)

    def conclude(self, result: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Returns the unigram entropy (nats), and a log line that compares the validation loss with it."""
        entropy = self.unigram_entropy
        change = result["val_loss"] / entropy - 1
        return {"unigram_entropy": entropy}, (
            f"validation loss {result['val_loss']:.3f} nats per token, {abs(change):.0%} "
            f"{'above' if change > 0 else 'below'} the corpus's unigram entropy {entropy:.3f}"
        )


class Pretraining(OnCorpus):
    """The stage `pretrain`."""

    name, settings = "pretrain", PretrainConfig
    parent = None

    def __init__(self, config: PretrainConfig) -> None:
        self.config, self.vocabulary = config, config.data.dirs[0]


def start(content: Mapping[str, Any]) -> int:
    """Like `main`, with settings as plain values."""
    return main(build(PretrainConfig, content))


def main(config: PretrainConfig) -> int:
    """Starts or resumes a pretraining run: see `ictx.train.run.main`."""
    return run.main(Pretraining(config), config)
