"""TRL's DPOTrainer with transformers' model and ictx's attention, optimizer, order of pairs and checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import LambdaLR
from trl import DPOConfig as Arguments
from trl import DPOTrainer

from ictx.parallel.recompute import selective_contexts
from ictx.train.dpo_config import DpoConfig
from ictx.train.optimizer import adamw, learning_rate

LAYER = "DeepseekV3DecoderLayer"


def arguments(config: DpoConfig, device: torch.device, directory: Path) -> Arguments:
    """Converts a run's settings to TRL's.

    Args:
        device: on GPUs, accelerate shards the float32 weights with FSDP2 and computes in `train.dtype`; on other
            devices it supports only DistributedDataParallel.
        directory: TRL's output folder; stays empty unless TRL fails.
    """
    loop, on_gpu = config.train, device.type == "cuda"
    half = on_gpu and loop.dtype == "bfloat16"
    again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": bool(loop.lora and loop.lora.dropout)}
    if loop.recompute == "selective":
        again["context_fn"] = selective_contexts
    made = Arguments(
        output_dir=str(directory),
        max_steps=loop.steps,
        per_device_train_batch_size=loop.batch_size,
        per_device_eval_batch_size=loop.batch_size,
        gradient_accumulation_steps=loop.accumulate,
        max_length=loop.sequence_length,
        beta=config.dpo.beta,
        loss_type=[config.dpo.loss],
        precompute_ref_log_probs=True,
        max_grad_norm=config.optimizer.clip_norm,
        seed=loop.seed,
        # `RunTrainer.go` arranges the pairs in the run's order.
        train_sampling_strategy="sequential",
        bf16=half,
        use_cpu=not on_gpu,
        gradient_checkpointing=loop.recompute != "none",
        gradient_checkpointing_kwargs=again,
        fsdp="full_shard" if on_gpu else None,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": [LAYER]} if on_gpu else None,
        logging_steps=loop.log_every,
        logging_first_step=False,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=loop.validate_every,
        save_strategy="steps",
        save_steps=loop.checkpoint_every,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
    )
    if on_gpu:
        # As in `ictx.parallel`. By default accelerate reduces gradients in bfloat16 and rounds log-probabilities to it.
        policy = MixedPrecisionPolicy(torch.bfloat16 if half else None, torch.float32, cast_forward_inputs=False)
        made.fsdp_plugin_args["mixed_precision_policy"] = policy
    return made


class PairTrainer(DPOTrainer):
    """TRL's trainer for tokenized pairs."""

    model: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any

    def __init__(self, config: DpoConfig, device: torch.device, **arguments: Any) -> None:
        """Computes the log-probabilities of the reference model and releases it.

        Args:
            arguments: DPOTrainer's, with `ref_model`; data sets need `prompt_ids`, `chosen_ids`, `rejected_ids`.
        """
        self.config, self.device_of_run = config, device
        super().__init__(**arguments)
        self.ref_model = None

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """Returns the pairs unchanged: they are tokenized already."""
        return dataset

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Returns the optimizer of ictx's own loop."""
        if self.optimizer is None:
            weights = [weight for weight in self.model.parameters() if weight.requires_grad]
            self.optimizer = adamw(weights, self.config.optimizer, self.device_of_run)
        return cast(torch.optim.Optimizer, self.optimizer)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Returns the learning rate schedule of ictx's own loop."""
        if self.lr_scheduler is None:
            rate = functools.partial(_share, steps=num_training_steps, config=self.config)
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, rate)
            self._created_lr_scheduler = True
        return cast(LambdaLR, self.lr_scheduler)


def _share(done: int, steps: int, config: DpoConfig) -> float:
    """Returns the learning rate of the next step relative to the peak; `done` steps are completed."""
    return learning_rate(min(done + 1, steps), steps, config.optimizer) / config.optimizer.learning_rate
