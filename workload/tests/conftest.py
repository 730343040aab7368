"""Fixtures: a corpus from Python's standard library, prepared once, and the command line in separate processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# The quick suite generates the same examples each time; the full suite generates many new ones.
settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("full", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("full" if os.environ.get("ICTX_SUITE") == "full" else "quick")

# Only the tests of Weights & Biases enable it.
os.environ["WANDB_MODE"] = "disabled"

VOCABULARY = 512
SETTINGS = f"""
model: {{vocab_size: {VOCABULARY}, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, num_attention_heads: 1,
         q_lora_rank: 32, max_position_embeddings: 256, initializer_range: 0.1}}
data: {{min_bytes: 100000, validation_share: 0.1}}
train: {{steps: 120, sequence_length: 32, batch_size: 8, dtype: float32, log_every: 1, validate_every: 60,
         validation_windows: 64, checkpoint_every: 45}}
optimizer: {{learning_rate: 1.0e-2, warmup_steps: 4}}
run: {{model_name: ictx-test}}
"""
CHAT_SETTINGS = """
data: {kind: sft}
train: {steps: 12, sequence_length: 192, batch_size: 4, dtype: float32, log_every: 1, validate_every: 6,
        validation_windows: 8, checkpoint_every: 4, recompute: none}
optimizer: {learning_rate: 3.0e-3, warmup_steps: 2}
run: {model_name: "", experiment: sft}
"""
ANSWERS = ["Yes.", "No, it is not.", "Perhaps; who knows, grün?", "Ask again later, when more is known."]


def conversation(number: int) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": f"Is {number} even? <|im_end|>"},
        {"role": "assistant", "content": f"{ANSWERS[number % 4]} {number}"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": ANSWERS[number % 3]},
    ]
    return {"messages": turns[: 2 + 2 * (number % 2)]}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests that need a GPU on machines without one."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@dataclass
class Ended:
    """Status and output of an ended process."""

    status: int
    out: str
    err: str


@dataclass
class Commands:
    """Runs `ictx` with the settings above and an MLflow store in `folder`."""

    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def tracking_uri(self) -> str:
        """URI of the MLflow store."""
        return f"sqlite:///{self.folder}/mlflow/mlflow.db"

    def start(
        self, *arguments: object, module: str = "ictx", prefix: tuple[str, ...] = (), env: Mapping[str, str] = {}
    ) -> subprocess.Popen[str]:
        """Starts `python -m ictx ARGUMENTS` (or another module)."""
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, *map(str, arguments)],
            env=os.environ | {"MLFLOW_TRACKING_URI": self.tracking_uri, "OMP_NUM_THREADS": "1"} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def end(self, process: subprocess.Popen[str]) -> Ended:
        """Waits for the end of a process; the timeout, long enough for a busy machine, ends one that hangs."""
        out, err = process.communicate(timeout=900)
        return Ended(process.returncode, out, err)

    def run(self, *arguments: object, prefix: tuple[str, ...] = ()) -> Ended:
        """Starts a command and waits for its end."""
        return self.end(self.start(*arguments, prefix=prefix))

    def pretrain(self, run: Path, data: Path, *settings: str) -> list[object]:
        """Returns the arguments of a training in the folder `run` on `data`."""
        wanted = [f"run.dir={run}", f"data.dir={data}", *settings]
        return ["train", "pretrain", "--config", self.folder / "test.yaml", *(f"--set={value}" for value in wanted)]

    def ranks(
        self, count: int, *arguments: object, each: Sequence[Mapping[str, str]] | None = None
    ) -> list[subprocess.Popen[str]]:
        """Starts a command as the ranks of one job without torchrun, so that tests can read each rank's status.

        `each` has additional environment variables for every rank.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        job = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        job |= {"ICTX_IMAGE_DIGEST": "sha256:feed", "SLURM_JOB_ID": "4711"}
        return [
            self.start(*arguments, env=job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | own)
            for rank, own in enumerate(each or [{}] * count)
        ]


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The command line; ends all processes that it started after the tests."""
    result = Commands(tmp_path_factory.mktemp("ictx"))
    (result.folder / "test.yaml").write_text(SETTINGS)
    (result.folder / "mlflow").mkdir()
    yield result
    for process in result.started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def corpus() -> Path:
    """A folder of text in Python's standard library."""
    return Path(sysconfig.get_path("stdlib"), "email")


@pytest.fixture(scope="session")
def prepared(commands: Commands, corpus: Path) -> Path:
    """The folder of the prepared corpus."""
    out, link = commands.folder / "data", commands.folder / "prepared"
    config = commands.folder / "test.yaml"
    ended = commands.run("data", "prepare", "--config", config, "--corpus", corpus, "--out", out, "--link", link)
    assert ended.status == 0, ended.err
    return link


@pytest.fixture(scope="session")
def parent(commands: Commands, prepared: Path) -> Path:
    """A run of a few steps, as the parent of stages that need a trained model."""
    run = commands.folder / "parent"
    ended = commands.run(*commands.pretrain(run, prepared, "train.steps=30", "run.model_name="))
    assert ended.status == 0, ended.err
    return run


@pytest.fixture(scope="session")
def chats(commands: Commands) -> Path:
    """Conversations, prepared for fine-tuning with the settings in `sft.yaml`."""
    config, file = commands.folder / "sft.yaml", commands.folder / "chats.jsonl"
    config.write_text(CHAT_SETTINGS)
    file.write_text("".join(json.dumps(conversation(number)) + "\n" for number in range(120)))
    out, link = commands.folder / "chats", commands.folder / "chats-link"
    words = ["--config", config, "--corpus", file, "--out", out, "--link", link, "--set=data.validation_share=0.2"]
    ended = commands.run("data", "prepare", *words)
    assert ended.status == 0, ended.err
    return link


@pytest.fixture
def tune(
    commands: Commands, parent: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Returns a function that fine-tunes in a new folder and returns the folder."""
    from ictx.train.child import main
    from ictx.train.config import read
    from ictx.train.sft import Tuning

    monkeypatch.setenv("MLFLOW_TRACKING_URI", commands.tracking_uri)

    def run(name: str, *settings: str) -> Path:
        wanted = [f"init=run:{parent}", f"run.dir={tmp_path / name}", f"data.dir={chats}", *settings]
        assert main(Tuning, read(str(commands.folder / "sft.yaml"), wanted)) == 0
        return tmp_path / name

    return run
