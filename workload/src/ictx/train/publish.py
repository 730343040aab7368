"""The end of a run: exports and registers the model, and writes result.json."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ictx.errors import UserError
from ictx.folder import write_whole
from ictx.model.hf import write_pretrained
from ictx.track.journal import Journal
from ictx.train.config import StageConfig
from ictx.train.lora import ADAPTER, merged, write_adapter
from ictx.train.stage import Stage


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Returns a model's unsharded weights in host memory on the first rank; every rank calls it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))


def publish(
    stage: Stage, config: StageConfig, weights: Mapping[str, Tensor], journal: Journal, result: dict[str, Any]
) -> None:
    """Exports and registers the model and writes result.json; every rank calls it, the first one writes.

    Args:
        weights: unsharded tensors by their names in a `Transformer`.
    """
    assert config.run.dir
    for measure in ("final_loss", "val_loss"):
        if not math.isfinite(result[measure]):
            raise UserError(f"{measure} of {config.run.dir} is {result[measure]}: the model is not exported")
    tracker = journal.tracker
    if tracker is None:
        return
    dtype = getattr(torch, config.train.dtype)
    if lora := config.train.lora:
        weights, learned = merged(weights, lora)
        assert stage.parent
        write_adapter(config.run.dir / ADAPTER, learned, lora, stage.parent.directory, stage.parent.registered, dtype)
        result["adapter_dir"] = str(config.run.dir / ADAPTER)
    directory = config.run.dir / "export"
    write_pretrained(directory, config.model, weights, stage.vocabulary, dtype, end_of_text=stage.end_of_text)
    name = config.run.model_name
    version = tracker.register(directory, name, config.run.alias) if name else None
    name = tracker.model
    further, line = stage.conclude(result)
    result |= further | {
        "stage": stage.name,
        "parent": stage.parent.origin if stage.parent else "",
        "data_fingerprint": stage.fingerprint,
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
    journal.say(line)
    if version:
        journal.say(f"registered models:/{name}@{config.run.alias} (version {version}) from {directory}")
