"""Context parallelism, HSDP, and both give the losses, gradients and experts' counts of one process with all tokens.

Some labels are masked, so that ranks have unequal numbers of labels, also between next-token and further prediction.
"""

from __future__ import annotations

import json
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import CHAT_SETTINGS, Commands
from models import MOE, SMALL
from test_extend import STAGE
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from ictx.data.loader import Batch
from ictx.errors import UserError
from ictx.model import ModelConfig, Transformer
from ictx.parallel import Layout, exchange, parallelize
from ictx.parallel.communication import COLLECTIVES
from ictx.train.config import load
from ictx.train.loss import next_token_loss, token_counts
from ictx.train.ranks import Ranks

RANKS, ROWS, LENGTH = 4, 4, 32
TOKENS = torch.randint(97, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(6))
# Documents that end at the boundary of two ranks, end within a rank, or are longer than a rank's part.
IDS = torch.tensor([[0] * 8 + [1] * 24, [0] * 3 + [1] * 18 + [2] * 11, [0] * 32, [0] * 31 + [1]])
PLACES = torch.cat([torch.arange(n) for n in (8, 24, 3, 18, 11, 32, 31, 1)]).view(ROWS, LENGTH)
# A window without labels, one with few, and first labels, which the further prediction does not use.
LABELS = TOKENS[:, 1:].where(torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.7, -1)
LABELS[1], LABELS[2, 3:], LABELS[:, 0] = -1, -100, TOKENS[:, 1]
DENSE: dict[str, Any] = {"num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 64}
EXPERTS = DENSE | {"moe": MOE, "num_nextn_predict_layers": 1}

Found = tuple[Tensor, list[Tensor], list[Tensor]]


def trained(model: Transformer, batch: Batch, documents: bool, ranks: Ranks | None = None) -> Found:
    """Returns this rank's share of the loss and its parts, the full gradients, and its tokens per expert."""
    model.init_weights(3)
    model.train()
    model.z_loss_weight = 0.01
    counts = token_counts(model, batch)
    loss, parts = next_token_loss(model, batch, documents, ranks.sums([counts]) if ranks else counts)
    (loss * (ranks.count if ranks else 1)).backward()  # type: ignore[no-untyped-call]
    gradients = [weight.grad for weight in model.parameters()]
    whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in gradients]
    losses = torch.stack([loss.detach(), *(parts[name] for name in sorted(parts))]).double()
    return losses, whole, [router.tokens_per_expert.clone() for router in model.routers]


def spread(settings: dict[str, Any], layout: Layout, documents: bool, **how: Any) -> Found:
    """Returns the result of `trained` with a layout over all ranks."""
    layout = layout.of(RANKS)
    ranks = Ranks(dist.get_rank(), RANKS, torch.device("cpu"), layout.sharding("cpu"), layout.context("cpu"))
    with torch.device("meta"):
        model = Transformer(ModelConfig(**(SMALL | settings)))
    parallelize(model, ranks.mesh, dtype=None, context=ranks.context, **how).to_empty(device="cpu")
    share = ROWS // ranks.data_count
    rows = slice(ranks.data_rank * share, (ranks.data_rank + 1) * share)
    batch = Batch(TOKENS[rows, :-1], LABELS[rows], PLACES[rows], IDS[rows]).part(*ranks.part)
    losses, gradients, counts = trained(model, batch, documents, ranks)
    for value in (losses, *counts):
        dist.all_reduce(value)
    return losses, gradients, counts


def same(settings: dict[str, Any], documents: bool, layout: Layout, **how: Any) -> None:
    """Compares the result of all ranks with that of one process."""
    batch = Batch(TOKENS[:, :-1], LABELS, PLACES, IDS)
    wanted = trained(Transformer(ModelConfig(**(SMALL | settings))), batch, documents)
    found = spread(settings, layout, documents, **how)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def compiled() -> None:
    """Every layer is one graph with the collectives as operations; a stub replaces the compiler's back end."""
    compile, torch.compile = torch.compile, lambda f, **k: compile(f, backend="aot_eager", fullgraph=True, **k)
    try:
        same(DENSE, True, Layout(cp=2), compiled=True, mode="selective")
    finally:
        torch.compile = compile


def in_parts() -> None:
    """Attends to keys and values of one head at a time."""
    whole, exchange.AT_ONCE = exchange.AT_ONCE, 1
    try:
        same(DENSE | {"num_attention_heads": 8}, True, Layout(cp=2))
    finally:
        exchange.AT_ONCE = whole


def noted() -> None:
    """The recorded times cover every collective of FSDP, context parallelism and replicas."""
    settings, parts = DENSE | {"num_hidden_layers": 1}, {}
    COLLECTIVES.device = torch.device("cpu")
    try:
        for name, layout in (("fsdp", Layout()), ("hsdp", Layout(2)), ("cp", Layout(cp=4))):
            COLLECTIVES.read()
            spread(settings, layout, False)
            parts[name] = len(COLLECTIVES._spans)
            assert 0 < COLLECTIVES.read() < 60
    finally:
        COLLECTIVES.device = None
    # Weights of the layer, twice, and of the rest; gradients of the layer and of the rest.
    assert parts["fsdp"] == 5
    assert parts["hsdp"] == 5 + 2, "plus the sums over replicas"
    # Forward: latents, queries, results; backward: these and their gradients, and the sum of the latents' gradients.
    assert parts["cp"] == 5 + 3 + 6


CASES: dict[str, Callable[[], None]] = {
    "cp 4": lambda: same(DENSE, False, Layout(cp=4)),
    "cp 4, documents, recomputed": lambda: same(DENSE, True, Layout(cp=4), mode="full"),
    "cp 2 × fsdp 2, documents, kept attention": lambda: same(DENSE, True, Layout(cp=2), mode="selective"),
    "cp 2 × hsdp 2, in the host's memory": lambda: same(
        DENSE, True, Layout(dp_replicate=2, cp=2), mode="selective", offload=True
    ),
    "cp 2, experts, further token, documents": lambda: same(EXPERTS, True, Layout(cp=2), mode="selective"),
    "cp 4, experts, further token, in the host's memory": lambda: same(
        EXPERTS, False, Layout(cp=4), mode="full", offload=True
    ),
    "cp 2, in parts": in_parts,
    "cp 2, two parts that overlap": lambda: same(DENSE | {"num_attention_heads": 8}, True, Layout(cp=2)),
    "cp 2, parts of unequal size": lambda: same(DENSE | {"num_attention_heads": 6}, False, Layout(cp=2)),
    "cp 2, compiled": compiled,
    "collectives": noted,
    "fsdp 4": lambda: same(EXPERTS, True, Layout()),
    "hsdp 2 × 2": lambda: same(EXPERTS, True, Layout(dp_replicate=2)),
    "replicated": lambda: same(DENSE, False, Layout(dp_replicate=4, dp_shard=1)),
}


def rank(number: int, port: int, out: str) -> None:
    """Runs all cases as one rank, and writes the error of each case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=RANKS)
    found = {}
    for name, case in CASES.items():
        try:
            case()
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    Path(f"{out}.{number}").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The errors of each rank, by case."""
    out = str(tmp_path_factory.mktemp("context") / "found")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(rank, (port, out), nprocs=RANKS)  # type: ignore[no-untyped-call]
    return [json.loads(Path(f"{out}.{number}").read_text()) for number in range(RANKS)]


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(case: str, outcomes: list[dict[str, str]]) -> None:
    assert "".join(found[case] for found in outcomes) == ""


def records(commands: Commands, data: Path, ranks: int, steps: int, *settings: str) -> list[dict[str, Any]]:
    """Returns the records of a run of `steps` steps over the same windows."""
    run = commands.folder / "-".join(["context", str(steps), str(ranks), *settings])
    limits = [f"train.{name}={steps}" for name in ("steps", "validate_every", "checkpoint_every")]
    # Small steps, as in real runs: with large ones rounding errors grow tenfold every few steps.
    fixed = [
        "model.num_attention_heads=2",
        "run.model_name=",
        "train.mask_documents=true",
        "optimizer.learning_rate=3.0e-4",
    ]
    return recorded(commands, run, ranks, *commands.pretrain(run, data, *limits, *fixed, *settings))


def recorded(commands: Commands, run: Path, ranks: int, *words: object) -> list[dict[str, Any]]:
    """Runs a command as several ranks, and returns its records in the run's folder."""
    ended = [commands.end(rank) for rank in commands.ranks(ranks, *words)]
    assert [rank.status for rank in ended] == [0] * ranks, ended
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def close(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Compares losses, gradient norms and validation losses."""
    for name in ("loss", "gradient_norm"):
        limit = 1e-5 if name == "loss" else 1e-3
        assert [one[name] for one in found] == pytest.approx([one[name] for one in wanted], rel=limit)
    assert found[-1]["validation_loss"] == pytest.approx(wanted[-1]["validation_loss"], rel=1e-5)


def test_a_run_that_shares_out_windows_is_that_of_one_process(commands: Commands, prepared: Path) -> None:
    found, wanted = records(commands, prepared, 2, 6, "parallel.cp=2"), records(commands, prepared, 1, 6)
    close(found, wanted)
    for record in found:
        assert 0 < record["communication_seconds"] < record["step_seconds"]
    assert not [record for record in wanted if "communication_seconds" in record], "one rank does not communicate"


@pytest.mark.full
@pytest.mark.parametrize("stage", ["extend", "sft"])
def test_a_stage_with_a_parent_shares_out_windows_too(
    commands: Commands, prepared: Path, chats: Path, tmp_path: Path, stage: str
) -> None:
    """With four times the parent's context, and with conversations that do not attend to each other."""
    records(commands, prepared, 1, 2)
    data = prepared if stage == "extend" else chats
    (tmp_path / "stage.yaml").write_text(STAGE if stage == "extend" else CHAT_SETTINGS)
    same = [f"init=run:{commands.folder / 'context-2-1'}", f"data.dir={data}", "optimizer.learning_rate=3.0e-4"]
    same += ["train.steps=6", "train.validate_every=6"]
    same += ["model.yarn.factor=4", "train.sequence_length=128"] if stage == "extend" else []
    found, wanted = (
        recorded(
            commands, run, ranks, "train", stage, "--config", tmp_path / "stage.yaml",
            *(f"--set={each}" for each in [*same, f"run.dir={run}", f"parallel.cp={ranks}"]),
        )
        for ranks, run in ((2, tmp_path / "shared"), (1, tmp_path / "alone"))
    )  # fmt: skip
    assert len(found) == 6
    close(found, wanted)


@pytest.mark.full
def test_fifty_steps_of_every_layout_are_those_of_one_process(commands: Commands, prepared: Path) -> None:
    wanted = records(commands, prepared, 1, 50)
    for batch, *settings in (
        ["train.batch_size=4", "parallel.cp=2"],
        ["train.batch_size=2", "parallel.dp_replicate=2"],
    ):
        close(records(commands, prepared, 4, 50, batch, *settings), wanted)


def test_a_layout_that_does_not_fit_is_refused() -> None:
    assert Layout(dp_replicate=2, cp=2).of(8) == Layout(2, 2, 2)
    for wrong in (Layout(dp_replicate=3), Layout(dp_shard=2), Layout(cp=8), Layout(2, 2, 2)):
        with pytest.raises(UserError, match="does not make 4 ranks"):
            wrong.of(4)
    for setting, text in {
        "parallel.cp=0": "cp is 0",
        "parallel.dp_shard=-2": "dp_shard is -2",
        "parallel.cp=3": "parallel.cp is 3: expected to divide model.num_attention_heads, 16",
    }.items():
        with pytest.raises(UserError, match=text):
            load("pretrain/ictx-1b.yaml", [setting])
    with pytest.raises(UserError, match=r"divide train\.sequence_length, 32766"):
        load("pretrain/ictx-1b.yaml", ["parallel.cp=4", "train.sequence_length=32766"])
