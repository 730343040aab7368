"""Preference optimization with ictx's own loop, and the parts that TRL's trainer uses too."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from ictx.data.tokenizer import read_tokenizer
from ictx.errors import UserError
from ictx.folder import write_whole
from ictx.manifest import open_regular, read_json
from ictx.model import Transformer
from ictx.train import dpo_pairs
from ictx.train.child import Child
from ictx.train.dpo_config import DpoConfig
from ictx.train.dpo_loss import answer_log_probs, pair_counts, pair_losses, preference_loss
from ictx.train.dpo_pairs import Array, PairBatches, Pairs
from ictx.train.init import Parent, take
from ictx.train.loss import Counts, Loss
from ictx.train.prepared import checked_folder
from ictx.train.ranks import Ranks, on_first
from ictx.train.sharded import sharded_model

PAIRS, REFERENCE, LOG_PROBS = "pairs", "reference", "reference.safetensors"
"""Names in a run's folder: tokenized pairs; the model of `dpo.reference`; log-probabilities of the answers."""
PLAN = "plan.json"
"""File in a run's folder with the number of training pairs that its starts need."""
PAUSE = 10.0
"""Seconds between progress lines."""
MARGIN, ACCURACY = "validation_rewards/margins", "validation_rewards/accuracies"


class PreferenceStage(Child):
    """The stage `dpo`."""

    config: DpoConfig
    name, settings = "dpo", DpoConfig

    def __init__(self, config: DpoConfig, parent: Parent) -> None:
        super().__init__(config, parent)
        assert config.run.dir
        self.directory: Path = config.run.dir

    @property
    def data_dir(self) -> Path:
        """Folder with the prepared rows."""
        if self.config.data.dir is None:
            raise UserError("data.dir is not set: add --set data.dir=FOLDER, the path that `ictx data prepare` printed")
        return self.config.data.dir

    def open(self, ranks: Ranks) -> tuple[Pairs, Parent]:
        """Returns the tokenized pairs and the reference model; every rank calls it. Raises UserError."""
        data, length = checked_folder(self.data_dir, self.config.data), self.config.train.sequence_length
        folder, vocabulary = self.directory / PAIRS, self.vocabulary
        reference = on_first(self._reference)
        on_first(lambda: dpo_pairs.make(folder, data, vocabulary, length))
        pairs = dpo_pairs.opened(folder, vocabulary, length)
        self.used = on_first(lambda: self._used(len(pairs.train), ranks))
        self.fingerprint = f"{pairs.fingerprint} {reference.origin}"
        self.reference = reference.origin
        return pairs, reference

    def _used(self, count: int, ranks: Ranks) -> list[int]:
        """Returns the indices of the training pairs that the run needs, so that the reference model scores only these.

        The number is saved, because a start with other settings may resume anywhere in the plan of earlier starts.
        """
        loop, note = self.config.train, self.directory / PLAN
        total = loop.steps * loop.accumulate * loop.batch_size * ranks.data_count
        plan = read_json(note) if note.exists() else {"total": 0, "needed": 0}
        if plan["total"] != total:
            plan = {"total": total, "needed": plan["needed"] + total}
            write_whole(note, json.dumps(plan) + "\n")
        return sorted(dpo_pairs.places(count, loop.seed, 0, min(count, plan["needed"])))

    def _reference(self) -> Parent:
        """Returns the reference model. Raises UserError if its vocabulary differs from the parent's."""
        name, run = self.config.dpo.reference, self.config.run
        if name is None:
            return self.parent
        (self.directory / REFERENCE).mkdir(exist_ok=True)
        found = take(name, self.directory / REFERENCE, run.tracking_patience)
        ours, theirs = (read_tokenizer(each.directory).get_vocab() for each in (self.parent, found))
        if ours != theirs or found.config.vocab_size != self.parent.config.vocab_size:
            raise UserError(
                f"dpo.reference is {name}, whose vocabulary differs from that of {self.parent.init}: use a reference "
                "with the same tokenizer"
            )
        return found

    def batches(self, ranks: Ranks) -> PairBatches:
        """Returns the training pairs with the reference model's log-probabilities. Raises UserError."""
        loop = self.config.train
        self.pairs, reference = self.open(ranks)
        self.scores = self._scores(reference, ranks)
        self.ranks = ranks
        return PairBatches(self.pairs, self.scores["train"], loop.batch_size, loop.seed, ranks)

    def _scores(self, reference: Parent, ranks: Ranks) -> dict[str, Array]:
        """Returns log-probabilities of answers, float32 (pairs, 2); computed once per run.

        `train` and `validation` are by the reference model; `init` is of the validation pairs by the initial model.
        """
        path, key = self.directory / LOG_PROBS, {"of": self.fingerprint, "pairs": str(len(self.used))}
        if on_first(lambda: path.exists() and _metadata(path) == key):
            with safe_open(path, "np") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found: dict[str, Array] = {}
        for parent, splits in ((reference, ("train", "validation")), (self.parent, ("init",))):
            if parent is self.parent and reference is self.parent and "init" in splits:
                found["init"] = found["validation"].copy()
                continue
            model = sharded_model(parent.config, self.config.train, ranks)
            parent.load(model)
            for split in splits:
                data = self.pairs.train if split == "train" else self.pairs.validation
                chosen = self.used if split == "train" else range(len(data))
                found[split] = np.zeros((len(data), 2), np.float32)
                found[split][[*chosen]] = self._log_probs(model, data, chosen, ranks, f"log-probabilities, {split}")
            del model
        on_first(lambda: _save(path, found, key))
        return found

    @torch.no_grad()
    def _log_probs(
        self, model: Transformer, data: Any, chosen: Sequence[int], ranks: Ranks, about: str | None = None
    ) -> Array:
        """Returns the model's log-probabilities of both answers of some pairs, (pairs, 2), on every rank.

        Args:
            about: title of progress lines; None: no progress lines.
        """
        batch, (place, parts) = self.config.train.batch_size, ranks.part
        found = torch.zeros(len(chosen), 2, dtype=torch.float64, device=ranks.device)
        logged = time.monotonic()
        # A sharded forward needs all ranks, so every rank runs the same number; surplus pairs are repeated.
        for first in range(0, len(chosen), batch * ranks.data_count):
            numbers = [first + ranks.data_rank * batch + one for one in range(batch)]
            own = [chosen[number % len(chosen)] for number in numbers]
            pairs = self.pairs.batch(data[own], np.zeros((batch, 2)), parts).part(place, parts).to(ranks.device)
            scores = answer_log_probs(model, pairs).view(2, -1).T.double()
            for number, score in zip(numbers, scores, strict=True):
                if number < len(chosen):
                    found[number] = score / parts
            if about and time.monotonic() - logged > PAUSE:
                logged = time.monotonic()
                ranks.say(f"{about}: {first:,} of {len(chosen):,} pairs")
        torch.distributed.all_reduce(found)
        return np.asarray(found.float().cpu())

    def counts(self, model: Transformer, batch: Any) -> Counts:
        """Returns the number of pairs."""
        return pair_counts(model, batch)

    def loss(self, model: Transformer, batch: Any, totals: Counts) -> Loss:
        """Returns the preference loss."""
        return preference_loss(model, batch, self.config.dpo, totals)

    def examine(self, model: Transformer) -> dict[str, float]:
        """Returns loss and rewards on held-out pairs."""
        chosen = self.held_out(self.pairs)
        return self._measured(chosen, self._log_probs(model, self.pairs.validation, chosen, self.ranks))

    def held_out(self, pairs: Pairs) -> range:
        """Returns the indices of the validation pairs: spread evenly, and always the same."""
        available = len(pairs.validation)
        count = min(available, self.config.train.validation_windows)
        return range(0, available // count * count, available // count)

    def _measured(self, chosen: range, scores: Array) -> dict[str, float]:
        pairs = self.pairs.batch(self.pairs.validation[[*chosen]], self.scores["validation"][[*chosen]])
        ratios = torch.from_numpy(scores.T.reshape(-1).copy()) - pairs.reference
        margins = self.config.dpo.beta * (ratios.chunk(2)[0] - ratios.chunk(2)[1])
        return {
            "validation_loss": float(pair_losses(ratios, pairs.lengths, self.config.dpo).mean()),
            MARGIN: float(margins.mean()),
            ACCURACY: float((margins > 0).float().mean()),
        }

    def conclude(self, result: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Returns the held-out rewards before and after training, and a log line about them."""
        if self.config.engine == "ictx":
            chosen = self.held_out(self.pairs)
            before = self._measured(chosen, self.scores["init"][[*chosen]])
        else:
            before = recorded(self.directory)[0]
        after = recorded(self.directory)[-1]
        found = {
            "reward_margin_before": before[MARGIN], "reward_margin": after[MARGIN],
            "reward_accuracy_before": before[ACCURACY], "reward_accuracy": after[ACCURACY],
        }  # fmt: skip
        return found | {"engine": self.config.engine, "reference": self.reference}, (
            f"held-out reward margin {before[MARGIN]:.4f} before, {after[MARGIN]:.4f} after; "
            f"{after[ACCURACY]:.0%} of the pairs ranked correctly"
        )


def recorded(directory: Path) -> list[dict[str, float]]:
    """Returns the records of a run's evaluations, including that before training."""
    with open_regular(directory / "metrics.jsonl") as file:
        records = [json.loads(line) for line in file if line.endswith(b"\n")]
    return [record for record in records if MARGIN in record]


def _metadata(path: Path) -> Mapping[str, str]:
    with safe_open(path, "np") as file:
        return file.metadata() or {}


def _save(path: Path, arrays: dict[str, Array], key: dict[str, str]) -> None:
    draft = path.with_name(f"{path.name}.part")
    save_file(arrays, draft, key)
    draft.replace(path)
