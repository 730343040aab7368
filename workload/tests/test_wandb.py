"""Weights & Biases: uploaded metrics equal MLflow's, and its failures do not stop a training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Commands
from mlflow import MlflowClient
from test_run import short, tracked
from wandb_server import WandbServer

from ictx.errors import UserError
from ictx.track import wandb
from ictx.track.config import TrackConfig
from ictx.train.pretrain import main as train

KEY = "0123456789abcdef" * 2 + "deadbeef"
__all__ = ["tracked"]

JOURNAL = """
import signal, sys, time
from pathlib import Path
from ictx.track import wandb
from ictx.track.config import TrackConfig
from ictx.track.journal import Journal
wandb.INIT_SECONDS = 5.0
first, last = int(sys.argv[2]), int(sys.argv[3])
track = TrackConfig(wandb="online", project="p", name="one", group="sweep")
patience = 5.0 if "slow" in sys.argv else 60.0
journal = Journal(True, Path(sys.argv[1]), "e", {"train": {"steps": last}}, first - 1, patience, track=track)
for step in range(first, last + 1):
    start = time.monotonic()
    journal.record({"step": step, "loss": 1 / step})
    journal.flush(step)
    print("step", step, time.monotonic() - start, flush=True)
    if "slow" in sys.argv:
        sys.stdin.readline()
journal.finish("FINISHED")
print("ended", flush=True)
import os; os._exit(0)
"""


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as found:
        yield found
        found.blocked = False
        found.shutdown()


def environment(commands: Commands, server: WandbServer, tmp_path: Path) -> dict[str, str]:
    """Returns an environment with the server's key and no other."""
    given = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "MLFLOW_TRACKING_URI": commands.tracking_uri}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    folders = {"NETRC": "netrc", "WANDB_CONFIG_DIR": "config", "WANDB_DIR": "uploads"}
    return kept | given | {name: str(tmp_path / folder) for name, folder in folders.items()}


def start(folder: Path, first: int, last: int, env: Mapping[str, str], *further: str) -> subprocess.Popen[str]:
    """Starts a process that records steps."""
    folder.mkdir(exist_ok=True)
    arguments = [sys.executable, "-c", JOURNAL, str(folder), str(first), str(last), *further]
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, env=env, text=True, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)


def end(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "ended" in out, out
    return out


def mlflow_metrics(folder: Path) -> dict[tuple[str, int], float]:
    """Returns MLflow's values of a run, by metric and step."""
    client, run_id = MlflowClient(), (folder / "mlflow_run_id").read_text().strip()
    names = client.get_run(run_id).data.metrics
    return {(name, each.step): each.value for name in names for each in client.get_metric_history(run_id, name)}


def wandb_metrics(rows: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """Returns W&B's values of a run, by metric and step."""
    steps = [row["_step"] for row in rows]
    assert steps == sorted({*steps}), "each step must be recorded once, in order"
    return {(name, row["_step"]): value for row in rows for name, value in row.items() if name[0] != "_"}


def test_an_offline_run_is_one_over_two_starts_and_its_upload_equals_mlflow(
    commands: Commands, prepared: Path, tmp_path: Path, server: WandbServer, capfd: pytest.CaptureFixture[str]
) -> None:
    run, settings = tmp_path / "run", ["track.wandb=offline", "track.group=g", "run.experiment=e"]
    for steps in (3, 6):
        assert train(short(commands, prepared, run, f"train.steps={steps}", *settings)) == 0
    run_id = (run / "wandb_run_id").read_text().strip()
    assert f"upload it with: wandb sync {run / 'wandb'}" in capfd.readouterr().out
    (folder,) = (run / "wandb").glob("*run-*")
    sync = [Path(sys.executable).with_name("wandb"), "sync", run / "wandb"]
    env = environment(commands, server, tmp_path)
    listed = subprocess.run([*sync, "--dry-run"], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Would sync 1 run(s)" in listed.stderr and folder.name in listed.stderr
    assert not server.history
    subprocess.run(sync, env=env, cwd=tmp_path, check=True, timeout=120)
    assert wandb_metrics(server.history[run_id]) == pytest.approx(mlflow_metrics(run))
    assert [row["_step"] for row in server.history[run_id]] == [1, 2, 3, 4, 5, 6], "W&B's steps must be the training's"
    assert all(abs(row["_timestamp"] - time.time()) < 600 for row in server.history[run_id])
    there, here = server.upserts[run_id], MlflowClient().get_run((run / "mlflow_run_id").read_text().strip())
    config = json.loads(there["config"])
    assert config["train"]["value"]["steps"] == 6 and config["model"]["value"]["hidden_size"] == 64
    assert config["links"]["value"]["mlflow_run_id"] == here.info.run_id
    assert (there["displayName"], there["groupName"], there["project"]) == (here.info.run_name, "g", "e")
    assert (here.data.tags["wandb.run_id"], here.data.tags["wandb.path"]) == (run_id, f"e/{run_id}")
    # Other fields describe the run, not the machine.
    assert not {"host", "commit", "repo"} & {*there}
    assert not [*folder.rglob("*metadata*"), *folder.rglob("requirements.txt"), *folder.rglob("output.log")]


def test_an_online_run_goes_on_where_the_server_has_it(commands: Commands, tmp_path: Path, server: WandbServer) -> None:
    env, run = environment(commands, server, tmp_path), tmp_path / "run"
    out = end(start(run, 1, 3, env))
    # The second start resumes from step 2, without its last checkpoint, so it sends steps again.
    out += end(start(run, 2, 5, env))
    (run_id,) = server.history
    assert wandb_metrics(server.history[run_id]) == {("loss", step): 1 / step for step in range(1, 6)}
    assert server.exit_codes[run_id] == [0, 0]
    page = f"{server.url}/team/p/runs/{run_id}"
    assert f"W&B: {page}" in out
    tags = MlflowClient(commands.tracking_uri).get_run((run / "mlflow_run_id").read_text().strip()).data.tags
    assert tags["wandb.url"] == page
    files = [path for path in run.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY.encode() in path.read_bytes()] and KEY not in out
    assert len(files) > 5


def test_a_server_that_does_not_answer_leaves_an_offline_run(
    commands: Commands, tmp_path: Path, server: WandbServer
) -> None:
    server.blocked = True
    run = tmp_path / "run"
    out = end(start(run, 1, 9, environment(commands, server, tmp_path)))
    assert "W&B does not answer" in out and f"wandb sync {run / 'wandb'}" in out
    seconds = [float(line.split()[2]) for line in out.splitlines() if line.startswith("step ")]
    assert len(seconds) == 9 and max(seconds) < 4, "no step may wait for the server"
    assert [*(run / "wandb").glob("offline-run-*/*.wandb")]


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_end_of_wandb_s_process_stops_no_training(
    commands: Commands, tmp_path: Path, server: WandbServer, number: int
) -> None:
    run, env = tmp_path / "run", environment(commands, server, tmp_path)
    process = start(run, 1, 5, env, "slow")
    assert process.stdin
    while not (found := core(process.pid)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(2)
    os.kill(found[0], number)
    try:
        process.stdin.write("\n" * 5)
        process.stdin.flush()
        assert ("not tracked there" if number == signal.SIGKILL else "does not answer") in end(process)
    finally:
        if number == signal.SIGSTOP:
            os.kill(found[0], signal.SIGKILL)
    end(start(run, 6, 6, env))
    (run_id,) = server.history
    assert [row["_step"] for row in server.history[run_id]] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ], "the next start sends missing steps"


def core(parent: int) -> list[int]:
    """Returns the child processes `wandb-core` of a process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = status.read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        if name == "wandb-core" and int(rest.split()[1]) == parent:
            found.append(int(status.parent.name))
    return found


def test_online_without_a_key_is_refused_before_anything_is_taken(
    commands: Commands, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    with pytest.raises(UserError, match=r"track\.wandb is online, but .* set WANDB_API_KEY .*track\.wandb=offline"):
        train(short(commands, prepared, tmp_path / "run", "track.wandb=online"))
    assert not (tmp_path / "run").exists()


def test_without_the_package_a_run_is_tracked_elsewhere_unless_it_names_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert wandb.mode(TrackConfig()) == "disabled"
    wandb.check(TrackConfig())
    for wanted in ("online", "offline"):
        with pytest.raises(UserError, match=rf"track\.wandb is {wanted}, but wandb is not installed: install it"):
            wandb.check(TrackConfig(wandb=wanted))
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match=r"track\.wandb is offline, but wandb is not installed"):
        wandb.check(TrackConfig())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"wandb": "on"}, "wandb is on: expected one of auto, online, offline, disabled"),
        ({"project": ""}, "project is : expected a name"),
        ({"group": "a\nb"}, "group is"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrackConfig(**settings)
