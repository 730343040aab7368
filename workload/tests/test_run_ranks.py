"""Runs of several ranks give the results of one rank, and resume after any failure."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Commands
from test_pretrain import EXPERTS, curve, result_of, wait_for_step

pytestmark = pytest.mark.full

STEPS = 50
LAYOUTS = {
    "one": (1, []),
    "two": (2, []),
    "four": (4, []),
    "replicated": (4, ["parallel.dp_replicate=2"]),
    "accumulated": (2, ["train.accumulate=2"]),
    "reduced once": (2, ["train.accumulate=2", "train.reduce_once=true"]),
}
"""Number of ranks, and settings, each with eight windows per step."""


def arguments(settings: Path, run: Path, data: Path, count: int, further: list[str]) -> list[object]:
    """Returns the arguments of a run whose global batch does not depend on the number of ranks."""
    times = 2 if "train.accumulate=2" in further else 1
    wanted = [f"run.dir={run}", f"data.dir={data}", f"train.batch_size={8 // count // times}", *further]
    return ["train", "pretrain", "--config", settings, *(f"--set={value}" for value in wanted)]


def ended(commands: Commands, count: int, *words: object) -> list[str]:
    """Returns the output of the ranks, all of which must succeed."""
    ranks = [commands.end(rank) for rank in commands.ranks(count, *words)]
    assert [rank.status for rank in ranks] == [0] * count, ranks
    return [rank.out for rank in ranks]


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_any_number_of_ranks_does_what_one_does_and_goes_on_with_what_two_saved(
    commands: Commands, prepared: Path, tmp_path: Path, kind: str
) -> None:
    """Also with experts and the further prediction, replicas, and accumulated batches."""
    settings = tmp_path / "run.yaml"
    settings.write_text(EXPERTS if kind == "experts" else (commands.folder / "test.yaml").read_text())
    same = [f"train.steps={STEPS}", "train.checkpoint_every=25", "train.keep_checkpoints=9", "run.model_name="]
    same += ["optimizer.learning_rate=1e-3", "train.validation_windows=16", "train.validate_every=25"]
    for name, (count, further) in LAYOUTS.items():
        ended(commands, count, *arguments(settings, tmp_path / name, prepared, count, same + further))
    one = curve(tmp_path / "one")
    assert list(one) == list(range(1, STEPS + 1))
    for name in LAYOUTS:
        for step, (loss, _) in curve(tmp_path / name).items():
            assert loss == pytest.approx(one[step][0], rel=1e-5), f"{name}, step {step}"
        assert result_of(tmp_path / name)["val_loss"] == pytest.approx(
            result_of(tmp_path / "one")["val_loss"], rel=1e-5
        )
    two = curve(tmp_path / "two")
    for count in (1, 2, 4):
        run = tmp_path / f"resumed by {count}"
        shutil.copytree(tmp_path / "two", run)
        shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08}")
        out, *_ = ended(commands, count, *arguments(settings, run, prepared, count, same))
        assert "resuming after step 25" in out
        for step, (loss, _) in curve(run).items():
            exact = count == 2 or step <= 25
            assert loss == (two[step][0] if exact else pytest.approx(two[step][0], rel=1e-5)), f"{count}, step {step}"


def printed(rank: subprocess.Popen[str], text: str) -> None:
    """Waits until a rank has printed the text."""
    assert rank.stdout
    while text not in (line := rank.stdout.readline()):
        assert line, rank.communicate()


def during_a_save(run: Path, ranks: list[subprocess.Popen[str]]) -> None:
    """Waits for the start of the training, and then until a checkpoint is being written."""
    printed(ranks[0], "parameters, ")
    while all(rank.poll() is None for rank in ranks):
        if any(run.glob("checkpoints/*.part")):
            return
        time.sleep(0.001)
    raise AssertionError([rank.communicate() for rank in ranks])


def test_whatever_ends_a_run_the_next_start_goes_on(commands: Commands, prepared: Path, tmp_path: Path) -> None:
    """A killed rank, a full disk, and a signal to stop in the middle of a save, each of them twice."""
    same = ["train.steps=60", "train.checkpoint_every=3", "run.model_name=", "train.timeout=300"]
    run = tmp_path / "run"
    words, uninterrupted = (commands.pretrain(folder, prepared, *same) for folder in (run, tmp_path / "whole"))
    # With a new metrics store, since the tests' shared one may not fit on the full disk.
    (tmp_path / "mlflow").mkdir()
    commands = Commands(tmp_path, commands.started)
    ended(commands, 2, *uninterrupted)

    def statuses(ranks: list[subprocess.Popen[str]]) -> list[Any]:
        return [commands.end(rank) for rank in ranks]

    for victim in (0, 1):
        ranks = commands.ranks(2, *words)
        during_a_save(run, ranks)
        ranks[victim].send_signal(signal.SIGKILL)
        found = statuses(ranks)
        assert found[victim].status == -signal.SIGKILL
        assert found[1 - victim].status == 2, "the other rank must not wait forever"
        assert "ictx: a rank has exited or does not respond" in found[1 - victim].err
    for _ in range(2):
        ranks = commands.ranks(2, *words)
        during_a_save(run, ranks)
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        assert [rank.status for rank in statuses(ranks)] == [75, 75]
    for _ in range(2):
        before = sorted(path.name for path in (run / "checkpoints").glob("step-????????"))
        ranks = commands.ranks(2, *words)
        during_a_save(run, ranks)
        for rank in ranks:
            subprocess.run(["prlimit", f"--pid={rank.pid}", "--fsize=2500000"], check=True)
        printed(ranks[0], "training continues, the last checkpoint is of step")
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)
        assert [rank.status for rank in statuses(ranks)] == [2, 2], "the checkpoint could not be saved"
        assert before[-1] <= max(path.name for path in (run / "checkpoints").glob("step-????????"))
    ended(commands, 2, *words)
    assert curve(run) == curve(tmp_path / "whole")
    assert not [*run.glob("checkpoints/*.part")]


def test_a_rank_that_hangs_is_named_and_ends_the_job(commands: Commands, prepared: Path, tmp_path: Path) -> None:
    ranks = commands.ranks(2, *commands.pretrain(tmp_path, prepared, "train.timeout=40", "train.steps=100000"))
    wait_for_step(tmp_path, 3, ranks)
    ranks[1].send_signal(signal.SIGSTOP)
    first = commands.end(ranks[0])
    ranks[1].kill()
    assert first.status == 2
    assert "rank 1 on " in first.err
    assert "does not respond, and the others wait in" in first.err
    assert (tmp_path / "hang" / "rank-00000.flight").stat().st_size > 0
    assert "Traceback" not in first.err
