"""Pretraining: next-token prediction over the prepared corpus, sharded with FSDP2."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ictx.data.loader import Batch, Batches
from ictx.data.shards import TokenArray
from ictx.errors import UserError
from ictx.folder import write_whole
from ictx.metrics import flops_per_token, model_flops_utilisation, peak_flops, write_about
from ictx.model import ModelConfig, Transformer
from ictx.model.float16 import by_layer, tracked_amax, warning
from ictx.parallel import parallelize
from ictx.train.checkpoint import MODEL_FILE, Checkpoints
from ictx.train.config import LoopConfig, OptimizerConfig, PretrainConfig
from ictx.train.failures import explained
from ictx.train.journal import Journal
from ictx.train.prepared import checked
from ictx.train.publish import publish
from ictx.train.ranks import Ranks, joined
from ictx.train.stopwatch import Stopwatch

# sysexits.h EX_TEMPFAIL: saved, run me again.
STOPPED = 75
# What a record tells the seconds of: the parts that make up a step, then what comes between steps.
STEP_PARTS = ("data", "forward", "backward", "optimizer", "ranks")
PAUSES = ("evaluation", "checkpoint")


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Returns the rate of step 1 … `steps`: a linear warm-up, then half a cosine down to the final share."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    share = config.final_share + (1 - config.final_share) * (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * share


def next_token_loss(model: nn.Module, batch: Batch, mask_documents: bool) -> Tensor:
    """Returns the mean cross-entropy, in nats, of each token's next one.

    Args:
        mask_documents: whether a token sees its own document only. If it sees the others, positions count through:
            with those of the documents, distances between two of them would mean nothing.
    """
    documents = {"position_ids": batch.position_ids, "document_ids": batch.document_ids} if mask_documents else {}
    return cast(Tensor, model(batch.input_ids, labels=batch.labels, **documents))


def sharded_model(config: ModelConfig, loop: LoopConfig, ranks: Ranks) -> Transformer:
    """Returns the model with the seed's weights, spread over all ranks."""
    with torch.device("meta"):
        model = Transformer(config)
    half = ranks.device.type == "cuda" and loop.dtype == "bfloat16"
    parallelize(
        model,
        ranks.mesh,
        dtype=torch.bfloat16 if half else None,
        mode=loop.recompute,
        layers=loop.recompute_layers,
        compiled=loop.compile,
    )
    # Only now is memory taken, on each rank for its own shards.
    model.to_empty(device=ranks.device)
    model.init_weights(loop.seed)
    return model


def new_optimizer(model: nn.Module, config: OptimizerConfig, ranks: Ranks) -> torch.optim.Optimizer:
    """Returns AdamW, in one kernel on GPUs; norms do not decay."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    fused, betas = ranks.device.type == "cuda", (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused)


class Pretraining:
    """One start of a run; it takes up what an earlier start saved."""

    def __init__(self, config: PretrainConfig, ranks: Ranks) -> None:
        """Makes the sharded model and loads the newest checkpoint. Raises UserError for data that does not fit."""
        if config.run.dir is None or config.data.dir is None:
            raise UserError("run.dir and data.dir are needed: --set run.dir=FOLDER --set data.dir=FOLDER")
        self.config, self.ranks, self.directory = config, ranks, config.run.dir
        loop = config.train
        folder = checked(config.data)
        data = TokenArray.open(folder, "train")
        if data.meta["vocab_size"] != config.model.vocab_size:
            raise UserError(
                f"{config.data.dir} was prepared with vocab_size {data.meta['vocab_size']}, but model.vocab_size is "
                f"{config.model.vocab_size}: prepare the corpus with this configuration"
            )
        self.validation = TokenArray.open(folder, "validation")
        if self.validation.windows(loop.sequence_length) < ranks.count:
            raise UserError(
                f"{config.data.dir} has fewer validation windows of {loop.sequence_length} tokens than there are "
                f"ranks, {ranks.count}: raise data.validation_share or prepare a larger corpus"
            )
        self.batches = Batches(data, loop.sequence_length, loop.batch_size, ranks.rank, ranks.count, loop.seed)
        if loop.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
        self.model = sharded_model(config.model, loop, ranks)
        self.optimizer = new_optimizer(self.model, config.optimizer, ranks)
        self.data_fingerprint: str = data.meta["fingerprint"]
        self.stopwatch = Stopwatch(ranks.device)
        self.losses = {"loss": math.nan, "validation_loss": math.nan}
        self.stops = 0.0
        self.checkpoints = Checkpoints(self.directory / "checkpoints", loop.keep_checkpoints)
        self.resumed_from = self._resume()

    def _state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds, in this rank's shards."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "batches": self.batches.state_dict(),
            "losses": self.losses,
            "data": self.data_fingerprint,
        }

    def _resume(self) -> int:
        """Loads the newest checkpoint and returns its step, or 0."""
        state = self._state()
        step = self.checkpoints.load_newest(state)
        if step:
            set_state_dict(
                self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
            self.batches.load_state_dict(state["batches"])
            self.losses = state["losses"]
        if state["data"] != self.data_fingerprint:
            raise UserError(
                f"{self.directory} was trained on other data than {self.config.data.dir} holds: give the data.dir that "
                "it began with, or another run.dir"
            )
        if step > self.config.train.steps:
            raise UserError(
                f"train.steps is {self.config.train.steps}, but {self.directory} has a checkpoint of step {step}: "
                "raise train.steps or give another run.dir"
            )
        return step

    def step(self, number: int) -> dict[str, float]:
        """Does one optimizer step, unless the loss or the gradient is not finite: then nothing changes.

        Returns the `loss` of all ranks, the whole gradient's norm, how experts are used, and whether the step was
        `skipped`.
        """
        rate = learning_rate(number, self.config.train.steps, self.config.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.stopwatch.start()
        batch = self.batches.next().to(self.ranks.device)
        self.stopwatch.lap("data")
        loss = next_token_loss(self.model, batch, self.config.train.mask_documents)
        auxiliary = self.model.auxiliary_loss()
        self.stopwatch.lap("forward")
        (loss + auxiliary).backward()  # type: ignore[no-untyped-call]
        self.stopwatch.lap("backward")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
        whole_norm = norm.full_tensor().item()  # type: ignore[attr-defined]
        self.stopwatch.lap("optimizer")
        mean, self.stops = self.ranks.total(loss.item() / self.ranks.count, float(self.ranks.told_to_stop))
        self.stopwatch.lap("ranks")
        record = {"loss": mean, "gradient_norm": whole_norm}
        # The same numbers on every rank: all of them update their weights, or none does.
        good = math.isfinite(mean) and math.isfinite(whole_norm)
        if good:
            self.optimizer.step()
        self.optimizer.zero_grad()
        violation = self.model.after_step(good)
        self.stopwatch.lap("optimizer")
        if violation is not None:
            record["expert_max_violation"] = violation.item()
        if auxiliary.requires_grad:
            record["auxiliary_loss"] = auxiliary.item()
        return record | {"skipped": float(not good)}

    def validate(self) -> dict[str, float]:
        """Returns the loss over windows spread evenly over the validation data, and how large activations got there.

        The windows are the same each time: `validation_loss`, `activation_amax/LAYER`.
        """
        # Compiled code has no hooks: what watches magnitudes needs the modules.
        with tracked_amax(self.model) as amax, torch.compiler.set_stance("force_eager"):
            loss = self._validation_loss()
        layers = by_layer(amax)
        peaks = dict(zip(layers, self.ranks.largest(*layers.values()), strict=True))
        if unsafe := warning(peaks):
            self.ranks.say(unsafe)
        return {"validation_loss": loss} | {f"activation_amax/{layer}": peak for layer, peak in peaks.items()}

    @torch.no_grad()
    def _validation_loss(self) -> float:
        loop, ranks = self.config.train, self.ranks
        # Every rank does the same number of batches: a sharded forward needs all of them.
        available = self.validation.windows(loop.sequence_length) // ranks.count
        each = min(available, loop.validation_batches * loop.batch_size)
        stride = available // each
        total = 0.0
        for first in range(0, each, loop.batch_size):
            numbers = range(first, min(first + loop.batch_size, each))
            places = [(number * stride) * ranks.count + ranks.rank for number in numbers]
            batch = Batch.of([self.validation.window(place, loop.sequence_length) for place in places])
            loss = next_token_loss(self.model, batch.to(ranks.device), self.config.train.mask_documents)
            total += loss.item() * len(numbers)
        return ranks.total(total)[0] / (each * ranks.count)

    def run(self, journal: Journal) -> dict[str, Any] | None:
        """Trains to the last step and returns the result, or None when told to stop (a checkpoint is saved then)."""
        loop, ranks = self.config.train, self.ranks
        tokens_per_step = loop.batch_size * ranks.count * loop.sequence_length
        size = sum(weight.numel() for weight in self.model.parameters())
        flops, each = flops_per_token(self.config.model, loop.sequence_length), peak_flops(ranks.device)
        peak = each * ranks.count if each else None
        if ranks.first:
            name = self.config.run.model_name or self.config.run.experiment
            write_about(self.directory, "pretrain", name, loop.steps, size)
        began = time.monotonic()
        saved = logged = self.resumed_from
        busy, skipped, in_a_row, due = 0.0, 0, 0, False
        for step in range(self.resumed_from + 1, loop.steps + 1):
            start = time.monotonic()
            record = self.step(step)
            busy += time.monotonic() - start
            loss, bad = record["loss"], bool(record.pop("skipped"))
            skipped, in_a_row = skipped + bad, in_a_row + 1 if bad else 0
            if bad:
                found = f"the loss is {loss} at step {step} (gradient norm {record['gradient_norm']})"
                if in_a_row > loop.bad_steps:
                    raise UserError(
                        f"{found}, after {loop.bad_steps} steps like it (train.bad_steps); the last good checkpoint is "
                        f"of step {saved}: lower optimizer.learning_rate"
                    )
                journal.say(f"{found}: weights stay as they are")
            else:
                self.losses["loss"] = loss
            last = step == loop.steps
            if step % loop.log_every == 0 or last:
                record = {"step": step} | record | {"skipped_steps": skipped}
                record["learning_rate"] = learning_rate(step, loop.steps, self.config.optimizer)
                record["tokens_per_second"] = (step - logged) * tokens_per_step / busy
                record["step_seconds"] = busy / (step - logged)
                record |= model_flops_utilisation(record["tokens_per_second"], flops, peak)
                line = f"step {step}/{loop.steps}: loss {loss:.3f}, {record['tokens_per_second']:,.0f} tokens/s"
                if step % loop.validate_every == 0 or last:
                    self.stopwatch.start()
                    record |= self.validate()
                    self.stopwatch.lap("evaluation")
                    if not math.isfinite(record["validation_loss"]):
                        raise UserError(
                            f"the validation loss is {record['validation_loss']} at step {step}, the last good "
                            f"checkpoint is of step {saved}: lower optimizer.learning_rate"
                        )
                    self.losses["validation_loss"] = record["validation_loss"]
                    line += f", validation loss {record['validation_loss']:.3f}"
                spent = self.stopwatch.read()
                record |= {f"{part}_seconds": spent.get(part, 0.0) / (step - logged) for part in STEP_PARTS + PAUSES}
                busy, skipped, logged = 0.0, 0, step
                journal.record(record)
                journal.say(line)
            # A series of bad steps is waited for: the weights that led to it must not take the place of better ones.
            due |= step % loop.checkpoint_every == 0 or self.stops > 0
            if (due and not bad) or last:
                # Its seconds are told by the next record: a record is written before the checkpoint that has its step.
                self.stopwatch.start()
                saved_as = self.checkpoints.save(step, self._state())
                self.stopwatch.lap("checkpoint")
                journal.say(f"saved {saved_as}")
                journal.flush()
                saved, due = step, False
            if self.stops and not bad and not last:
                journal.say(f"told to stop: ended after step {step}")
                return None
        return {
            "final_loss": self.losses["loss"],
            "val_loss": self.losses["validation_loss"],
            "unigram_entropy": self.validation.meta["unigram_entropy"],
            "steps": loop.steps,
            "tokens": loop.steps * tokens_per_step,
            "resumed_from_step": self.resumed_from,
            "seconds": round(time.monotonic() - began, 1),
            "checkpoint": str(self.checkpoints.complete()[-1]),
        }


def main(config: PretrainConfig) -> int:
    """Runs or goes on with a pretraining run; returns 0, or 75 (EX_TEMPFAIL) when it was told to stop and has saved.

    Raises UserError naming a setting, a path or the step at which the loss stopped being a number.
    """
    with explained(config.run.dir), joined() as ranks:
        training = Pretraining(config, ranks)
        training.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        start, patience = training.resumed_from, config.run.tracking_patience
        journal = Journal(ranks.first, training.directory, config.run.experiment, asdict(config), start, patience)
        if ranks.first:
            write_whole(training.directory / MODEL_FILE, yaml.safe_dump(asdict(config.model), sort_keys=False))
        size = sum(weight.numel() for weight in training.model.parameters())
        origin = f"resuming after step {training.resumed_from}" if training.resumed_from else "from the start"
        journal.say(
            f"{size:,} parameters, {training.batches.windows:,} windows of {config.train.sequence_length} tokens, "
            f"{ranks.count} ranks on {ranks.device.type}, {origin}"
        )
        try:
            result = training.run(journal)
            if result is None:
                journal.finish("KILLED")
                return STOPPED
            publish(config, training.model, journal, result)
        except BaseException:
            journal.finish("FAILED")
            raise
        journal.finish("FINISHED")
    return 0
