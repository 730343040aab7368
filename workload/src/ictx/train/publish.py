"""The end of a run: the model exported, registered, and summed up in result.json."""

from __future__ import annotations

import json
import os
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ictx.model import Transformer
from ictx.model.hf import write_pretrained
from ictx.train.config import PretrainConfig
from ictx.train.journal import Journal


def publish(config: PretrainConfig, model: Transformer, journal: Journal, result: dict[str, Any]) -> None:
    """Exports and registers the model and writes result.json; every rank calls it, the first one writes."""
    assert config.run.dir and config.data.dir
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = cast("dict[str, Tensor]", get_model_state_dict(model, options=options))
    tracker = journal.tracker
    if tracker is None:
        return
    directory = config.run.dir / "export"
    meta = json.loads((config.data.dir / "meta.json").read_text())
    _, end_of_text = meta["end_of_text"]
    dtype = getattr(torch, config.train.dtype)
    write_pretrained(directory, config.model, weights, config.data.dir, dtype, end_of_text=end_of_text)
    name = config.run.model_name
    version = tracker.register(directory, name, config.run.alias) if name else None
    name = tracker.model
    result |= {
        "export_dir": str(directory),
        "mlflow_run_id": tracker.run_id,
        "mlflow_experiment": tracker.experiment,
        "model_name": name,
        "model_version": version,
        "model_alias": config.run.alias,
        "image_digest": os.environ.get("ICTX_IMAGE_DIGEST", ""),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID", ""),
    }
    draft = config.run.dir / "result.json.part"
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(config.run.dir / "result.json")
    below = 1 - result["val_loss"] / result["unigram_entropy"]
    journal.say(
        f"validation loss {result['val_loss']:.3f} nats per token, {below:.0%} below the corpus's unigram entropy "
        f"{result['unigram_entropy']:.3f}"
    )
    if version:
        journal.say(f"registered models:/{name}@{config.run.alias} (version {version}) from {directory}")
