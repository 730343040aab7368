"""A run of `ictx train dpo` with TRL; the counterpart of `ictx.train.run`."""

from __future__ import annotations

import json
import os
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from datasets import disable_progress_bars
from transformers import DeepseekV3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from ictx.errors import UserError
from ictx.folder import write_whole
from ictx.metrics import write_about
from ictx.model.hf_attention import register
from ictx.train.checkpoint import MODEL_FILE, Checkpoints
from ictx.train.config import LoopConfig
from ictx.train.dpo_pairs import load_tokenizer
from ictx.train.dpo_reports import Reports
from ictx.train.dpo_resume import RunTrainer
from ictx.train.dpo_stage import PreferenceStage, recorded
from ictx.train.dpo_trainer import arguments
from ictx.train.init import Parent
from ictx.train.lora import adapt, init_adapter
from ictx.train.publish import publish, whole
from ictx.train.ranks import Ranks, on_first
from ictx.train.run import STOPPED, new_journal
from ictx.train.stage import Stage


def load_model(parent: Parent, attention: str, adapter: LoopConfig | None = None) -> Any:
    """Returns a parent as transformers' model, float32, in host memory.

    Args:
        attention: transformers' name of the attention implementation.
        adapter: settings of the training; with `lora` the model gets the same adapter as in ictx's own loop.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]
    model = DeepseekV3ForCausalLM.from_pretrained(parent.directory, dtype=torch.float32, attn_implementation=attention)
    if adapter and adapter.lora:
        adapt(model, adapter.lora)
        init_adapter(model, adapter.seed)
    return model


def conduct(stage: PreferenceStage, ranks: Ranks, directory: Path) -> int:
    """Starts or resumes a run: see `ictx.train.run.main`."""
    # Progress bars clutter a job's log, and users cannot act on transformers' deprecation warnings.
    os.environ.setdefault("TQDM_DISABLE", "1")
    disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    config = stage.config
    loop, attention = config.train, register()
    if loop.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    pairs, reference = stage.open(ranks)
    checkpoints = Checkpoints(directory / "checkpoints", loop.keep_checkpoints)
    # Loaded before the model is created: step and progress of the newest usable checkpoint.
    state = {"trainer": "", "data": stage.fingerprint}
    step = checkpoints.load_newest(state)
    if step and state["data"] != stage.fingerprint:
        raise UserError(
            f"{directory} was trained on other data than {stage.data_dir}, or with another reference: use those that "
            "it was started with, or another run.dir"
        )
    if step > loop.steps:
        raise UserError(
            f"train.steps is {loop.steps}, but {directory} has a checkpoint of step {step}: raise train.steps or use "
            "another run.dir"
        )
    past = json.loads(state["trainer"]) if step else {"taken": 0, "tokens": 0}
    journal = new_journal(cast("Stage", stage), config, ranks, directory, step)
    reports = Reports(journal, ranks, loop.steps)
    trained_on = pairs.train.select(stage.used)
    held_out = pairs.validation.select(stage.held_out(pairs))
    with tempfile.TemporaryDirectory() as scratch:
        given = arguments(config, ranks.device, Path(scratch))
        given.eval_on_start = step == 0
        trainer = RunTrainer(
            config, ranks, checkpoints, reports, past, stage.fingerprint,
            model=load_model(stage.parent, attention, loop), ref_model=load_model(reference, attention), args=given,
            train_dataset=trained_on, eval_dataset=held_out,
            processing_class=load_tokenizer(stage.vocabulary),
        )  # fmt: skip
        parameters = sum(weight.numel() for weight in trainer.model.parameters())
        if ranks.first:
            write_whole(directory / MODEL_FILE, yaml.safe_dump(asdict(config.model), sort_keys=False))
            write_about(directory, stage.name, config.run.model_name or config.run.experiment, loop.steps, parameters)
        origin = f"resuming after step {step}" if step else f"from {stage.parent.origin}"
        journal.say(
            f"{parameters:,} parameters, {len(pairs.train):,} pairs, TRL, {ranks.count} ranks on {ranks.device.type}, "
            f"{origin}"
        )
        began = time.monotonic()
        try:
            ranks.limit(loop.timeout)
            trainer.go(step, len(pairs.train), stage.used, Path(scratch))
            if trainer.state.global_step < loop.steps:
                journal.say(f"stop requested: stopped after step {trainer.state.global_step}")
                journal.finish("KILLED")
                return STOPPED
            result = trainer.result(on_first(lambda: recorded(directory))[-1]) | {
                "resumed_from_step": step,
                "seconds": round(time.monotonic() - began, 1),
                "checkpoint": str(checkpoints.complete()[-1]),
            }
            publish(cast("Stage", stage), config, whole(trainer.model), journal, result)
        except BaseException:
            journal.finish("FAILED")
            raise
        finally:
            checkpoints.close(wait=True)
    journal.finish("FINISHED")
    return 0
