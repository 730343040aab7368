"""SLURM's exporter on the files that jobs write: valid folders, and folders that attack it or other users."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from slurm_exporter import PROGRAM, skipped, values, written

training = PROGRAM.training
ME = os.getuid()
WHO = 'job_id="7",user="ann",stage=""'
LOSS = f"ictx_training_loss{{{WHO}}}"
INFO = "ictx_training_info{" + WHO


def run_of(number: str = "7", user: str = "ann", uid: int = ME, running: bool = True) -> Any:
    """Returns a job in the exporter's representation."""
    return training.Run(number, user, uid, running)


def gathered(runs: Path, *jobs: Any) -> Any:
    """Returns the metrics of the folders of these jobs, by default ann's job 7."""
    metrics = PROGRAM.declared()
    training.gather(metrics, runs, jobs or (run_of(),))
    return metrics


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns the folder of ann's job 7, with one record, in the folder `runs`."""
    made = tmp_path / "runs/ann/7"
    made.mkdir(parents=True)
    (made / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    return made


@pytest.fixture
def runs(folder: Path) -> Path:
    """Returns the folder of all users' runs, with ann's job 7 and ben's valid job 8."""
    honest = folder.parents[1] / "ben/8"
    honest.mkdir(parents=True)
    (honest / "metrics.jsonl").write_text('{"step": 1, "loss": 4.5}\n')
    return folder.parents[1]


def with_honest(runs: Path) -> Any:
    """Returns the metrics of ann's and ben's jobs; ben's metrics must always exist."""
    metrics = gathered(runs, run_of(), run_of("8", "ben"))
    assert values(metrics)['ictx_training_loss{job_id="8",user="ben",stage=""}'] == 4.5
    return metrics


def test_a_training_job_is_reported_by_its_last_whole_record(tmp_path: Path) -> None:
    folder = tmp_path / "ann" / "7"
    (folder / "checkpoints/step-00000010").mkdir(parents=True)
    records = [
        {"step": 10, "loss": 3.0, "validation_loss": 3.1, "time": 100.0},
        {"step": 20, "loss": 2.5, "tokens_per_second": 900.0, "time": 130.0},
    ]
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "lo']))
    (folder / "mlflow_run_id").write_text("abc\n")
    (folder / "about.json").write_text('{"model": "tiny", "stage": "pretrain", "steps": 200}')
    metrics = gathered(tmp_path)
    found = values(metrics)
    who = 'job_id="7",user="ann",stage="pretrain"'
    assert found[f'ictx_training_info{{{who},mlflow_run="abc",model="tiny"}}'] == 1
    assert found[f"ictx_training_running{{{who}}}"] == 1
    assert found[f"ictx_training_step{{{who}}}"] == 20
    assert found[f"ictx_training_loss{{{who}}}"] == 2.5
    assert found[f"ictx_training_steps{{{who}}}"] == 200
    assert found[f"ictx_training_validation_loss{{{who}}}"] == 3.1
    assert found[f"ictx_training_record_interval_seconds{{{who}}}"] == 30
    assert f"ictx_training_last_checkpoint_timestamp_seconds{{{who}}}" in found
    assert f"ictx_training_mfu_ratio{{{who}}}" not in found
    assert skipped(metrics, tmp_path) == {}


def test_rewards_of_preferences_are_reported_by_names_that_prometheus_takes(runs: Path, folder: Path) -> None:
    record = {"step": 1, "rewards/margins": 0.25, "validation_rewards/accuracies": 0.75}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    found = values(gathered(runs))
    assert found[f"ictx_training_reward_margin{{{WHO}}}"] == 0.25
    assert found[f"ictx_training_validation_reward_accuracy_ratio{{{WHO}}}"] == 0.75


def test_a_loss_that_is_no_number_is_reported_as_such(runs: Path, folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    loss = values(gathered(runs))[LOSS]
    assert loss != loss


def test_jobs_that_ended_long_ago_are_not_reported(runs: Path, folder: Path) -> None:
    ended = run_of(running=False)
    assert values(gathered(runs, ended))[f"ictx_training_running{{{WHO}}}"] == 0
    os.utime(folder / "metrics.jsonl", (1, 1))
    assert LOSS not in values(gathered(runs, ended))
    assert LOSS in values(gathered(runs, run_of()))


def test_a_job_without_a_folder_is_no_training_job(runs: Path, tmp_path: Path) -> None:
    metrics = gathered(runs, run_of("9"), run_of("10", "carol"))
    assert skipped(metrics, tmp_path) == {}


def plant(content: str | bytes) -> Callable[[Path], None]:
    """Returns a function that writes a file."""
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content) and None


def sparse(path: Path) -> None:
    """Creates a sparse file of 1 TB."""
    with path.open("wb") as file:
        file.truncate(2**40)


def listening(path: Path) -> None:
    """Creates a socket."""
    # A socket's path has at most 108 bytes.
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


PLANTED: dict[str, Callable[[Path], None]] = {
    "link to a secret": lambda path: path.symlink_to(path.parents[3] / "secret"),
    "hard link to a secret": lambda path: path.hardlink_to(path.parents[3] / "secret"),
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "FIFO": lambda path: os.mkfifo(path),
    "socket": listening,
    "directory": lambda path: path.mkdir(),
}


@pytest.mark.attack(
    "H5",
    "puts a link to a secret or to /dev/zero, a FIFO, a socket or a directory where the exporter reads",
    before="the secret appeared in a world-readable file; the exporter was killed for its memory; it hung",
    now="only regular files of the job's user are opened, without following links",
)
@pytest.mark.parametrize("name", ["metrics.jsonl", "about.json", "mlflow_run_id"])
@pytest.mark.parametrize("what", PLANTED)
def test_only_regular_files_of_the_jobs_user_are_read(
    runs: Path, folder: Path, tmp_path: Path, name: str, what: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"loss": 90125, "model": "90125"}\n')
    os.chown(secret, 4711, 4711)
    (folder / name).unlink(missing_ok=True)
    PLANTED[what](folder / name)
    metrics = with_honest(runs)
    assert skipped(metrics, tmp_path) == {"training": 1}
    assert "90125" not in written(metrics, tmp_path)


@pytest.mark.parametrize("link", ["ann", "ann/7", "ann/7/checkpoints"])
def test_no_folder_is_reached_through_a_link(runs: Path, folder: Path, tmp_path: Path, link: str) -> None:
    other = tmp_path / "other"
    (other / "7/checkpoints/step-1").mkdir(parents=True)
    (other / "step-1").mkdir()
    (other / "metrics.jsonl").write_text('{"loss": 90125}\n')
    (other / "7/metrics.jsonl").write_text('{"loss": 90125}\n')
    path = runs / link
    if path.exists():
        path.rename(tmp_path / "away")
    path.symlink_to(other)
    metrics = with_honest(runs)
    assert skipped(metrics, tmp_path) == {"training": 1}
    assert "90125" not in written(metrics, tmp_path)
    assert "ictx_training_last_checkpoint_timestamp_seconds{" not in written(metrics, tmp_path)


@pytest.mark.parametrize("path", ["ann", "ann/7", "ann/7/metrics.jsonl", "ann/7/about.json", "ann/7/checkpoints"])
def test_what_belongs_to_somebody_else_is_not_read(runs: Path, folder: Path, tmp_path: Path, path: str) -> None:
    (folder / "about.json").write_text('{"model": "90125"}')
    (folder / "checkpoints/step-1").mkdir(parents=True)
    os.chown(runs / path, 4711, -1)
    metrics = with_honest(runs)
    assert skipped(metrics, tmp_path) == {"training": 1}
    if "about" in path:
        assert "90125" not in written(metrics, tmp_path)


@pytest.mark.parametrize("user", ["../ann", ".", "..", "", "ann/7", "\x00"])
def test_a_name_that_is_a_path_is_refused(runs: Path, tmp_path: Path, user: str) -> None:
    assert skipped(gathered(runs, run_of(user=user)), tmp_path) == {"training": 1}


LINES = {
    "nested brackets": "[" * 10_000,
    "nested objects": '{"a":' * 10_000 + "1" + "}" * 10_000,
    "an integer of 400 digits": '{"loss": ' + "9" * 400 + "}",
    "an integer of 10,000 digits": '{"loss": ' + "9" * 10_000 + "}",
    "a number": "5",
    "no UTF-8": b'{"loss": 1, "x": "\xff"}',
    "bytes of 0": b"\x00" * 100,
    "half an object": '{"loss": 1',
}


@pytest.mark.attack(
    "H5",
    "writes about.json or metrics.jsonl with 10,000 brackets, a 400-digit integer, half a surrogate pair, no UTF-8",
    before="no metric of SLURM was written",
    now="that row is skipped and counted; the job's other metrics are exposed",
)
@pytest.mark.parametrize("line", LINES)
def test_a_bad_line_costs_that_line(runs: Path, folder: Path, tmp_path: Path, line: str) -> None:
    text = LINES[line]
    bad = text.encode() if isinstance(text, str) else text
    (folder / "metrics.jsonl").write_bytes(b'{"loss": 2.5}\n' + bad + b"\n")
    metrics = with_honest(runs)
    assert values(metrics)[LOSS] == 2.5
    assert skipped(metrics, tmp_path) == {"training": 1}
    (folder / "metrics.jsonl").write_bytes(b'{"loss": 2.5}\n')
    (folder / "about.json").write_bytes(bad)
    metrics = with_honest(runs)
    assert values(metrics)[f'{INFO},mlflow_run="",model=""}}'] == 1
    assert skipped(metrics, tmp_path) == {"training": 1}


def test_a_label_has_printable_characters_only(runs: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "about.json").write_text('{"model": "\\ud800a\\nb\\u0000\\u202e", "stage": {"x": 1}}')
    metrics = with_honest(runs)
    mark = "\N{REPLACEMENT CHARACTER}"
    assert values(metrics)[f'{INFO},mlflow_run="",model="{mark}a{mark}b{mark}{mark}"}}'] == 1
    written(metrics, tmp_path)


@pytest.mark.parametrize("content", ["a b", "../x", "x" * 65, "a\nb", "é"])
def test_the_id_of_a_run_is_one(runs: Path, folder: Path, tmp_path: Path, content: str) -> None:
    (folder / "mlflow_run_id").write_text(content)
    metrics = with_honest(runs)
    assert values(metrics)[f'{INFO},mlflow_run="",model=""}}'] == 1
    assert skipped(metrics, tmp_path) == {"training": 1}


@pytest.mark.parametrize("value", ["true", '"3"', "null", "[1]", '{"a": 1}'])
def test_what_is_no_number_is_no_value(runs: Path, folder: Path, value: str) -> None:
    (folder / "metrics.jsonl").write_text(f'{{"loss": {value}, "step": 2, "time": {value}}}\n')
    found = values(gathered(runs))
    assert LOSS not in found
    assert found[f"ictx_training_step{{{WHO}}}"] == 2


@pytest.mark.parametrize("make", [sparse, plant(b"\n" * 2**24), plant(b"x" * 2**24)])
def test_of_a_huge_file_only_the_end_is_read(runs: Path, folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / "metrics.jsonl")
    for name in ("about.json", "mlflow_run_id"):
        make(folder / name)
    began = time.monotonic()
    assert LOSS not in values(with_honest(runs))
    assert time.monotonic() - began < 2


def test_of_very_many_checkpoints_some_are_read(
    runs: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = os.stat
    monkeypatch.setattr(training, "MOST_ENTRIES", 30)
    monkeypatch.setattr(training.os, "stat", lambda *a, **k: seen.append(a) or real(*a, **k))
    for step in range(100):
        (folder / f"checkpoints/step-{step:08}").mkdir(parents=True)
    assert f"ictx_training_checkpoint_interval_seconds{{{WHO}}}" in values(with_honest(runs))
    assert len(seen) == 30


def test_a_checkpoint_that_goes_while_it_is_looked_at_costs_nothing(
    runs: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        (folder / f"checkpoints/step-{step}").mkdir(parents=True)
    real = os.stat

    def gone(name: Any, *arguments: Any, **named: Any) -> os.stat_result:
        if name == "step-1":
            raise FileNotFoundError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(training.os, "stat", gone)
    metrics = with_honest(runs)
    assert f"ictx_training_last_checkpoint_timestamp_seconds{{{WHO}}}" in values(metrics)
    assert skipped(metrics, tmp_path) == {}


def test_what_was_opened_is_examined_not_what_had_the_name_before(
    runs: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"loss": 90125}\n')
    os.chown(secret, 4711, 4711)
    real = os.open

    def swapped(name: Any, *arguments: Any, **named: Any) -> int:
        if name == "metrics.jsonl" and "8" not in os.readlink(f"/proc/self/fd/{named['dir_fd']}").split("/")[-1]:
            (folder / name).unlink()
            (folder / name).hardlink_to(secret)
        return real(name, *arguments, **named)

    monkeypatch.setattr(training.os, "open", swapped)
    metrics = with_honest(runs)
    assert "90125" not in written(metrics, tmp_path)
    assert skipped(metrics, tmp_path) == {"training": 1}


def test_a_folder_that_may_not_be_entered_costs_that_job(runs: Path, tmp_path: Path, monkeypatch: Any) -> None:
    real = os.open

    def refused(name: Any, *arguments: Any, **named: Any) -> int:
        if name == "7":
            raise PermissionError(13, "Permission denied", name)
        return real(name, *arguments, **named)

    # This test may run as root, who can enter every folder.
    monkeypatch.setattr(training.os, "open", refused)
    assert skipped(with_honest(runs), tmp_path) == {"training": 1}


def test_nobody_uses_up_the_time_of_others(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(training, "MOST_SECONDS", 5)
    monkeypatch.setattr(training.time, "monotonic", lambda: next(ticks))
    metrics = gathered(runs, *[run_of(str(number)) for number in range(100, 200)], run_of("8", "ben"))
    assert values(metrics)['ictx_training_loss{job_id="8",user="ben",stage=""}'] == 4.5
    assert skipped(metrics, tmp_path) == {"limits": 96}


def test_the_folders_of_a_user_are_limited_and_running_jobs_come_first(runs: Path, tmp_path: Path) -> None:
    ended = [run_of(str(number), running=False) for number in range(100, 100 + training.FOLDERS_PER_USER)]
    metrics = gathered(runs, *ended, run_of())
    assert LOSS in values(metrics)
    assert skipped(metrics, tmp_path) == {"limits": 1}


def test_the_journal_is_not_flooded(runs: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "metrics.jsonl").write_text("\x1b[31m\n" * 1000)
    with_honest(runs)
    lines = capsys.readouterr().err.splitlines()
    assert 0 < len(lines) <= 20
    assert all(line.isprintable() and len(line) < 200 for line in lines)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([*training.FIELDS, "time", "model", "stage", "steps"])
OBJECTS = st.dictionaries(NAMES, JSON, max_size=4).map(lambda found: json.dumps(found).encode())


@given(
    st.lists(st.binary() | OBJECTS, max_size=4),
    st.binary() | OBJECTS,
    st.binary() | st.text().map(lambda text: text.encode(errors="surrogatepass")),
)
@example([b'{"time": 1e308}', b'{"time": -1e308}', b'{"time": Infinity}'], b'{"model": "\\ud800"}', b"")
def test_whatever_the_files_hold_the_file_is_valid_and_others_are_in_it(
    tmp_path_factory: Any, lines: list[bytes], about: bytes, run_id: bytes
) -> None:
    runs = tmp_path_factory.mktemp("runs")
    for number, user in (("7", "ann"), ("8", "ben")):
        (runs / user / number).mkdir(parents=True)
        (runs / user / number / "metrics.jsonl").write_bytes(b'{"loss": 4.5}\n')
    (runs / "ann/7/metrics.jsonl").write_bytes(b"\n".join([*lines, b""]))
    (runs / "ann/7/about.json").write_bytes(about)
    (runs / "ann/7/mlflow_run_id").write_bytes(run_id)
    written(with_honest(runs), runs)
