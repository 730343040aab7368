"""`ictx bench align`: steps of DPO and SFT on random tokens with random weights, compared with TRL.

Does not need MLflow. TRL's rows run its trainers on transformers' model under FSDP2, as `ictx train dpo` does: `trl`
with transformers' SDPA and recompute of every layer, which are TRL's defaults; `trl+ictx` with our attention, whose
result is kept unless `recompute` is full. `ictx` is our loop's model, loss and optimizer.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ictx.bench.train_case import Case, random_batch
from ictx.data.loader import Batch
from ictx.model import ModelConfig, Transformer
from ictx.model.hf_attention import register
from ictx.model.hf_config import to_hf
from ictx.train.config import LoopConfig, OptimizerConfig
from ictx.train.dpo_config import DpoConfig, PreferenceConfig
from ictx.train.dpo_loss import PairBatch, answer_log_probs, pair_counts, preference_loss
from ictx.train.loss import Loss, next_token_loss, token_counts
from ictx.train.optimizer import adamw
from ictx.train.ranks import Ranks, joined
from ictx.train.sharded import sharded_model

IMPLEMENTATIONS = ("trl", "trl+ictx", "ictx")


@dataclass(frozen=True)
class AlignCase:
    """A case to measure."""

    task: str
    """`dpo` or `sft`."""
    implementation: str
    config: ModelConfig
    sequence: int
    """Tokens per row; DPO has two rows per pair."""
    batch: int = 1
    """Rows (SFT) or pairs (DPO) per step."""
    steps: int = 5
    warm_up: int = 2
    compile: bool = False
    """Compile the layers of `ictx`."""
    recompute: str = ""
    """`none`, `selective` or `full`; default: `full` for `trl`, `selective` for the others."""

    @property
    def mode(self) -> str:
        """Effective recompute mode of this case."""
        return self.recompute or ("full" if self.implementation == "trl" else "selective")

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.sequence * self.batch * (2 if self.task == "dpo" else 1)

    def loop(self) -> LoopConfig:
        """The trainer's settings."""
        every = 1 << 30
        return LoopConfig(
            self.steps + self.warm_up, self.sequence, self.batch, recompute=self.mode, log_every=every,
            validate_every=every, checkpoint_every=every, compile=self.implementation == "ictx" and self.compile,
        )  # fmt: skip


@dataclass
class AlignRow:
    """Result of a case."""

    task: str
    implementation: str
    device: str
    sequence: int
    batch: int
    recompute: str
    step: float = 0.0
    """Median seconds per step."""
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    loss: float = 0.0
    note: str = ""
    """Reason if nothing was measured."""

    def line(self) -> str:
        """Returns the row as text; GB are 10^9 bytes."""
        name = f"{self.task} {self.sequence:,} × {self.batch} {self.implementation}, recompute {self.recompute}"
        if self.note:
            return f"{name}: not measured: {self.note}"
        memory = f"{self.peak_memory_bytes / 1e9:.1f} GB, " if self.peak_memory_bytes else ""
        return f"{name}: {self.step:.3f} s, {self.tokens_per_second:,.0f} tokens/s, {memory}loss {self.loss:.4f}"


class Clock:
    """Measures the seconds between steps, including the device's work, and its peak memory after the warm-up."""

    def __init__(self, case: AlignCase, device: torch.device) -> None:
        self.device, self.warm_up, self.marks = device, case.warm_up, list[float]()

    def tick(self) -> None:
        """Marks the beginning of a step, or the end of the last one."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            if len(self.marks) == self.warm_up:
                torch.cuda.reset_peak_memory_stats()
        self.marks.append(time.perf_counter())

    def row(self, case: AlignCase, loss: float) -> AlignRow:
        """Returns the result."""
        on_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name() if on_gpu else "cpu"
        timed = self.marks[self.warm_up :]
        step = statistics.median(b - a for a, b in pairwise(timed))
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        return AlignRow(
            case.task, case.implementation, name, case.sequence, case.batch, case.mode, step, case.tokens / step,
            peak, loss,
        )  # fmt: skip


def loss_of(case: AlignCase, model: Transformer, batch: Batch) -> Callable[[], Loss]:
    """Returns a function that computes the loss of random tokens; the first half of a pair's rows is the prompt."""
    if case.task == "sft":
        counts = token_counts(model, batch)
        return lambda: next_token_loss(model, batch, False, counts)
    labels = batch.labels.clone()
    labels[:, : case.sequence // 2] = -1
    nothing, lengths = torch.zeros(len(labels), device=labels.device), (labels >= 0).sum(1)
    with torch.no_grad():
        reference = answer_log_probs(model, PairBatch(batch.input_ids, labels, nothing, lengths))
    pairs = PairBatch(batch.input_ids, labels, reference, lengths)
    return lambda: preference_loss(model, pairs, PreferenceConfig(), pair_counts(model, pairs))


def ours(case: AlignCase, ranks: Ranks) -> AlignRow:
    """Measures our loop's model, loss and optimizer."""
    model = sharded_model(case.config, case.loop(), ranks)
    optimizer = adamw(model.parameters(), OptimizerConfig(), ranks.device)
    one = Case(case.config, case.sequence, case.batch * (2 if case.task == "dpo" else 1))
    compute, clock, loss = loss_of(case, model, random_batch(one, ranks)), Clock(case, ranks.device), 0.0
    for _ in range(case.steps + case.warm_up):
        clock.tick()
        mean, means = compute()
        mean.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = float(means["loss"])
    clock.tick()
    return clock.row(case, loss)


def random_peer(case: AlignCase, ranks: Ranks) -> Any:
    """Returns transformers' model with random weights."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    attention = "sdpa" if case.implementation == "trl" else register()
    torch.manual_seed(0)
    with ranks.device:
        return DeepseekV3ForCausalLM(
            DeepseekV3Config(**to_hf(case.config, torch.float32) | {"attn_implementation": attention})
        )


def trl(case: AlignCase, ranks: Ranks) -> AlignRow:
    """Measures TRL's trainer."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from ictx.train.dpo_trainer import PairTrainer, arguments

    clock = Clock(case, ranks.device)

    class Ticks(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.tick()

    words = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")  # type: ignore[no-untyped-call]
    generator, half = torch.Generator().manual_seed(0), case.sequence // 2

    def tokens(count: int) -> list[int]:
        return torch.randint(case.config.vocab_size, (count,), generator=generator).tolist()

    steps = range((case.steps + case.warm_up) * case.batch)
    config = DpoConfig(case.config, case.loop())
    with tempfile.TemporaryDirectory() as folder:
        given = arguments(config, ranks.device, Path(folder))
        given.eval_strategy = "no"
        common: dict[str, Any] = {"processing_class": tokenizer, "callbacks": [Ticks()]}
        common["model"] = random_peer(case, ranks)
        if case.task == "dpo":
            rest = case.sequence - half
            rows = [
                {"prompt_ids": tokens(half), "chosen_ids": tokens(rest), "rejected_ids": tokens(rest)} for _ in steps
            ]
            Dataset.from_list(rows).save_to_disk(f"{folder}/pairs")
            data = Dataset.load_from_disk(f"{folder}/pairs")
            trainer: Any = PairTrainer(
                config, ranks.device, args=given, train_dataset=data,
                ref_model=random_peer(case, ranks), **common,
            )  # fmt: skip
        else:
            kept = {name: getattr(given, name) for name in (
                "output_dir", "max_steps", "per_device_train_batch_size", "max_length", "bf16", "use_cpu", "fsdp",
                "gradient_checkpointing", "gradient_checkpointing_kwargs", "report_to", "disable_tqdm", "logging_steps",
            )}  # fmt: skip
            kept["fsdp_config"] = {"version": 2, "transformer_layer_cls_to_wrap": ["DeepseekV3DecoderLayer"]}
            kept |= {"save_strategy": "no"} | ({} if given.fsdp else {"fsdp_config": None})
            data = Dataset.from_list([{"input_ids": tokens(case.sequence)} for _ in steps])
            trainer = SFTTrainer(args=SFTConfig(**kept), train_dataset=data, **common)
        trainer.train()
        clock.tick()
        return clock.row(case, float(trainer.state.log_history[-1]["train_loss"]))


def measure(case: AlignCase) -> AlignRow:
    """Runs a case on this process's device; insufficient memory or a missing package becomes the note of the row."""
    try:
        with joined() as ranks:
            return (ours if case.implementation == "ictx" else trl)(case, ranks)
    except (ImportError, torch.OutOfMemoryError) as error:
        note = str(error).splitlines()[0][:200]
        return AlignRow(case.task, case.implementation, "", case.sequence, case.batch, case.mode, note=note)


def run(case: AlignCase) -> AlignRow:
    """Runs a case in a separate process, because libraries keep state and allocators keep memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, case).result()
