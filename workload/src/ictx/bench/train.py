"""`ictx bench train`: steps of the trainer's own model, optimizer and loss on random tokens, on several ranks.

A step's time is the median over the timed ones, between events on the GPU (without a GPU: on the host's clock). Ranks
wait for each other in every step, so the first rank's time is representative. Memory and utilisation are the first
rank's.
"""

from __future__ import annotations

import gc
import math
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ictx.bench.trace import trace
from ictx.bench.train_case import Case, Row, random_batch, row_of
from ictx.bench.train_peer import peer, replicated
from ictx.data.loader import Batch
from ictx.kernels.attention.op import choice
from ictx.metrics import flops_per_token, model_flops_utilisation, peak_flops
from ictx.stopwatch import Stopwatch
from ictx.train.config import OptimizerConfig
from ictx.train.loss import next_token_loss, token_counts
from ictx.train.optimizer import adamw
from ictx.train.ranks import Ranks, on_all
from ictx.train.sharded import sharded_model

PARTS = ("forward", "backward", "optimizer")


@contextmanager
def utilisation(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """Samples NVML's utilisation in the background; the yielded function returns the mean so far, 0 to 1, or None."""
    samples: list[int] = []
    over = threading.Event()

    def sample(handle: Any, rate: Any) -> None:
        while not over.wait(0.05):
            samples.append(rate(handle).gpu)

    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        thread = threading.Thread(target=sample, args=(handle, pynvml.nvmlDeviceGetUtilizationRates), daemon=True)
        thread.start()
    except Exception:  # no NVML, or no permission: nothing is measured
        thread = None
    try:
        yield lambda: statistics.mean(samples) / 100 if samples else None
    finally:
        over.set()
        if thread:
            thread.join()


def prepare(case: Case, ranks: Ranks) -> tuple[nn.Module, Callable[[Batch], Tensor]]:
    """Returns the model, and a function that computes its loss of a batch."""
    if case.implementation == "transformers":
        model = peer(case.config, ranks.mesh, ranks.device, compiled=case.compile)
        return model, lambda batch: model(input_ids=batch.input_ids, labels=batch.input_ids, use_cache=False).loss
    if case.implementation == "ddp":
        model = replicated(case.config, case.loop, ranks.device)
        return model, lambda batch: model(batch.input_ids, labels=batch.labels)
    ours = sharded_model(case.config, case.loop, ranks)

    def mean(batch: Batch) -> Tensor:
        return next_token_loss(ours, batch, False, token_counts(ours, batch))[0]

    return ours, mean


def local_bytes(tensors: Iterator[Any]) -> int:
    """Returns the bytes of this rank's shards of tensors."""
    shards = (x.to_local() if hasattr(x, "to_local") else x for x in tensors if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in shards)


def measure(case: Case, ranks: Ranks) -> Row:
    """Runs a case; every rank calls it."""
    on_gpu, device, row = ranks.device.type == "cuda", ranks.device, row_of(case, ranks)
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model, loss_of = prepare(case, ranks)
    if case.implementation != "transformers":
        query = torch.empty(0, case.config.qk_head_dim, dtype=torch.bfloat16 if on_gpu else None, device=device)
        row.attention = choice("mla_attention", query, case.config.v_head_dim, case.batch).name
    optimizer, batch = adamw(model.parameters(), OptimizerConfig(), device), random_batch(case, ranks)
    watch, measured = Stopwatch(device), []
    loss: float | Tensor = math.nan
    gradients = 0

    def step() -> None:
        nonlocal loss, gradients
        watch.start()
        mean = loss_of(batch)
        watch.lap("forward")
        mean.backward()  # type: ignore[no-untyped-call]
        watch.lap("backward")
        gradients = gradients or local_bytes(weight.grad for weight in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.lap("optimizer")
        loss = mean.detach()

    for _ in range(case.warm_up):
        step()
    watch.read()
    record, alone = None, case.profile and on_gpu and case.steps == 1
    with utilisation(device) as used:
        for _ in range(case.steps - alone):
            step()
            measured.append(watch.read())
        if alone:
            record = trace(step, 1)
            measured.append(watch.read())
        row.utilisation = used()
    row.loss = ranks.total(float(loss))[0] / ranks.count
    if case.profile and on_gpu and not alone:
        record = trace(step, 1)
    row.parts = {part: statistics.median(one[part] for one in measured) for part in PARTS}
    row.step = statistics.median(sum(one.values()) for one in measured)
    row.tokens_per_second = ranks.data_count * case.batch * case.sequence / row.step
    if record:
        row.communication, row.waiting = (x / row.step for x in record.covered("nccl"))
    peak = peak_flops(device)
    shares = model_flops_utilisation(
        row.tokens_per_second, flops_per_token(case.config, case.sequence), peak and peak * ranks.count
    )
    row.mfu_causal, row.mfu = shares.get("mfu_causal"), shares.get("mfu")
    held = {
        "weights": local_bytes(iter(model.parameters())),
        "optimizer": local_bytes(x for state in optimizer.state.values() for x in state.values()),
        "gradients": gradients,
    }
    row.memory = dict(held)
    if on_gpu:
        row.memory["peak"] = torch.cuda.max_memory_allocated()
        row.memory["activations and workspace"] = row.memory["peak"] - sum(held.values())
        row.memory["reserved"] = torch.cuda.max_memory_reserved()
        row.peaks = on_all(torch.cuda.max_memory_allocated)
    return row


def guarded(case: Case, ranks: Ranks) -> Row:
    """Runs a case; insufficient memory or a missing package becomes the note of the row."""
    try:
        return measure(case, ranks)
    except (ImportError, torch.OutOfMemoryError) as error:
        return row_of(case, ranks, note=str(error).splitlines()[0][:200])
