"""The end of a run: the model exported, registered, and summed up in result.json."""

from __future__ import annotations

import json
import math
import os
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ictx.data.shards import read_meta
from ictx.errors import UserError
from ictx.folder import write_whole
from ictx.model import Transformer
from ictx.model.hf import write_pretrained
from ictx.train.config import PretrainConfig
from ictx.train.journal import Journal


def publish(config: PretrainConfig, model: Transformer, journal: Journal, result: dict[str, Any]) -> None:
    """Exports and registers the model and writes result.json; every rank calls it, the first one writes."""
    assert config.run.dir and config.data.dir
    for measure in ("final_loss", "val_loss"):
        if not math.isfinite(result[measure]):
            raise UserError(f"{measure} of {config.run.dir} is {result[measure]}: the model is not exported")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = cast("dict[str, Tensor]", get_model_state_dict(model, options=options))
    tracker = journal.tracker
    if tracker is None:
        return
    directory = config.run.dir / "export"
    _, end_of_text = read_meta(config.data.dir)["end_of_text"]
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
    write_whole(config.run.dir / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    below = 1 - result["val_loss"] / result["unigram_entropy"]
    journal.say(
        f"validation loss {result['val_loss']:.3f} nats per token, {below:.0%} below the corpus's unigram entropy "
        f"{result['unigram_entropy']:.3f}"
    )
    if version:
        journal.say(f"registered models:/{name}@{config.run.alias} (version {version}) from {directory}")
