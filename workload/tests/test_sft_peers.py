"""Fine-tuning compared with TRL and torchtune: the same data and settings give the same losses."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_pretrain import records
from transformers import AutoModelForCausalLM, AutoTokenizer

from ictx.data.chat.files import read_rows
from ictx.data.chat.packing import Windows
from ictx.data.chat.tokens import Conversations
from ictx.model.hf import load_pretrained
from ictx.settings import load_yaml, override
from ictx.train.config import OptimizerConfig
from ictx.train.optimizer import adamw

STEPS, BATCH, RATE = 20, 4, 5e-4
SAME = [
    f"train.steps={STEPS}",
    f"train.batch_size={BATCH}",
    f"optimizer.learning_rate={RATE}",
    "optimizer.warmup_steps=0",
    "optimizer.final_share=0.99999999",
    "optimizer.weight_decay=0.0",
    "packing=false",
]
"""A constant rate, and conversations without packing."""
TUNE = os.environ.get("ICTX_TORCHTUNE_PYTHON", "")
CONFIGS = Path(__file__).parents[1] / "configs"


def in_order(run: Path, chats: Path) -> list[Any]:
    """Returns the rows in the run's order; none may be too long."""
    (tokens,) = (run / "conversations").iterdir()
    windows, rows = Windows(Conversations.open(tokens / "train.bin"), 192, 0, False), list(read_rows(chats, "train"))
    assert len(windows) == len(rows)
    found = []
    for number in range(STEPS * BATCH):
        (conversation,) = windows.conversations(number)
        place = next(place for place in range(len(rows)) if windows.data[place].ctypes.data == conversation.ctypes.data)
        found.append(rows[place])
    return found


@pytest.mark.full
def test_losses_are_those_of_trl(
    tune: Callable[..., Path], parent: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    run = tune("run", *SAME)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)  # with these, accelerate would start a process group that remains
    model = AutoModelForCausalLM.from_pretrained(parent / "export", dtype=torch.float32)
    config = SFTConfig(
        str(tmp_path / "trl"),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        max_length=192,
        packing=False,
        assistant_only_loss=True,
        max_grad_norm=1.0,
        logging_steps=1,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    optimizer = adamw(model.parameters(), OptimizerConfig(learning_rate=RATE, weight_decay=0.0), torch.device("cpu"))
    trainer = SFTTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(in_order(run, chats)),
        processing_class=AutoTokenizer.from_pretrained(parent / "export"),
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )
    trainer.train()
    theirs = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    ours = [record["loss"] for record in records(run)]
    assert len(theirs) == len(ours) == STEPS and ours[-1] < ours[0] - 0.5
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.full
@pytest.mark.torchtune
@pytest.mark.skipif(not TUNE, reason="ICTX_TORCHTUNE_PYTHON is not set")
def test_losses_are_those_of_torchtune(tune: Callable[..., Path], parent: Path, chats: Path, tmp_path: Path) -> None:
    """`tune run` trains our export with the shipped configuration, and writes a checkpoint."""
    run = tune("run", *SAME)
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in in_order(run, chats)))
    # The shipped recipe with a constant rate.
    config = load_yaml(CONFIGS / "torchtune" / "tiny.yaml")
    del config["lr_scheduler"]
    wanted = {"export": parent / "export", "data": data, "output_dir": out, "shuffle": "false", "batch_size": BATCH}
    wanted |= {"max_steps_per_epoch": STEPS, "optimizer.lr": RATE, "optimizer.weight_decay": 0.0}
    config = override(config, [f"{name}={value}" for name, value in wanted.items()])
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(config))
    words = [
        TUNE,
        "-m",
        "torchtune._cli.tune",
        "run",
        "full_finetune_single_device",
        "--config",
        tmp_path / "tune.yaml",
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(words, env=os.environ | offline, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (log,) = (out / "logs").iterdir()
    theirs = [float(loss) for loss in re.findall(r"loss:([\d.]+)", log.read_text())]
    ours = [record["loss"] for record in records(run)]
    assert len(theirs) == len(ours) == STEPS and ours[-1] < ours[0] - 0.5
    assert ours == pytest.approx(theirs, abs=1e-3)
    left, kept = (load_pretrained(folder).state_dict() for folder in (out / "epoch_0", run / "export"))
    for name, weight in kept.items():
        torch.testing.assert_close(left[name], weight, rtol=1e-2, atol=2e-3, msg=name)
    assert AutoTokenizer.from_pretrained(out / "epoch_0").chat_template
