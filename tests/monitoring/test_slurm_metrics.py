"""The program that gathers SLURM's metrics: on what SLURM's own programs print, and when they do not answer."""

from __future__ import annotations

import json
import os
import re
import sys
import types
from pathlib import Path

import pytest
from cluster import ROOT
from programs import loaded

PROGRAM = ROOT / "roles/slurm_exporter/files/ictx-slurm-metrics"


def expand(nodes: str) -> list[str]:
    """Stands in for ClusterShell's, which is a package of the node: these tests have one range at most."""
    found = re.fullmatch(r"(\w+)\[(\d+)-(\d+)\]", nodes)
    return [f"{found[1]}{n}" for n in range(int(found[2]), int(found[3]) + 1)] if found else [nodes]


@pytest.fixture(scope="module")
def program() -> types.ModuleType:
    """Returns the program as a module."""
    folder = types.ModuleType("ClusterShell")
    folder.NodeSet = types.ModuleType("ClusterShell.NodeSet")
    folder.NodeSet.expand = expand
    sys.modules |= {"ClusterShell": folder, "ClusterShell.NodeSet": folder.NodeSet}
    return loaded(PROGRAM)


def values(metrics: object) -> dict[str, float]:
    """Returns the samples as in the text format: `name{label="value"}` → value."""
    found = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("(null)", 0),
        ("", 0),
        ("gpu:2", 2),
        ("gpu:a100:4(S:0-1)", 4),
        ("gpu:a100:1(IDX:0),gpu:h100:2(IDX:1-2)", 3),
        ("billing=8,cpu=8,gres/gpu=4,mem=1G,node=1", 4),
        ("gres/gpu:2", 2),
    ],
)
def test_gpus_are_counted_in_all_of_slurms_notations(program: types.ModuleType, gres: str, count: int) -> None:
    assert program.gpus(gres) == count


def test_nodes_that_take_no_jobs_are_told_with_the_reason(program: types.ModuleType) -> None:
    rows = [
        ["n1", "mixed", "1/1/0/2", "4096", "1024", "gpu:a100:4", "gpu:a100:1(IDX:0)", "Unknown", "none"],
        ["n2", "idle*", "0/2/0/2", "4096", "0", "(null)", "(null)", "1700000000", "Not responding"],
        ["n4", "planned", "0/2/0/2", "4096", "0", "(null)", "(null)", "Unknown", "none"],
        ["n3", "drained", "0/0/2/2", "4096", "0", "(null)", "(null)", "1700000005", "disk, by alice"],
    ]
    widths = program.NODE_COLUMNS.values()
    text = "\n".join("".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    metrics = program.declared()
    program.gather_nodes(metrics, text)
    found = values(metrics)
    assert found['slurm_node_available{node="n1"}'] == 1
    assert found['slurm_node_allocated_gpus{node="n1"}'] == 1
    assert found['slurm_node_memory_bytes{node="n1"}'] == 4096 * 2**20
    assert found['slurm_node_available{node="n2"}'] == 0
    assert found['slurm_node_available{node="n4"}'] == 1, "it is kept free for a job that starts soon"
    since = 'slurm_node_unavailable_since_seconds{node="n3",state="drained",reason="disk, by alice"}'
    assert found[since] == 1700000005


def test_jobs_are_told_with_their_nodes_and_reasons(program: types.ModuleType) -> None:
    lines = [
        "7|ann|a|batch|RUNNING|2|4|1700000000|1700000100|None|n[1-2]|gres/gpu:4|name with | in it",
        "8|ben|a|batch|PENDING|1|1|1700000200|N/A|Resources||N/A|x",
    ]
    metrics = program.declared()
    program.gather_jobs(metrics, list(program.job_rows("\n".join(lines))))
    found = values(metrics)
    assert found['slurm_job_node{job_id="7",user="ann",node="n2",job_name="name with | in it"}'] == 1
    assert found['slurm_jobs{partition="batch",user="ben",state="pending"}'] == 1
    waiting = 'slurm_job_pending_since_seconds{job_id="8",user="ben",partition="batch",reason="Resources"}'
    assert found[waiting] == 1700000200


def test_accounts_add_up_time_and_leave_out_what_runs(program: types.ModuleType) -> None:
    lines = [
        "ann|a|COMPLETED|100|400|cpu=4,gres/gpu=2",
        "ann|a|CANCELLED by 7|10|40|cpu=4",
        "ann|a|RUNNING|5|20|cpu=4,gres/gpu=1",
    ]
    metrics = program.declared()
    program.gather_accounts(metrics, "\n".join(lines))
    found = values(metrics)
    assert found['slurm_accounting_jobs{user="ann",account="a",state="cancelled"}'] == 1
    assert 'slurm_accounting_jobs{user="ann",account="a",state="running"}' not in found
    assert found['slurm_accounting_cpu_seconds{user="ann",account="a"}'] == 460
    assert found['slurm_accounting_gpu_seconds{user="ann",account="a"}'] == 205


def test_a_training_job_is_told_about_by_its_last_whole_record(program: types.ModuleType, tmp_path: Path) -> None:
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
    metrics = program.declared()
    ((found_folder, user, job, running),) = program.training_folders(tmp_path, {("ann", "7")})
    program.gather_training(metrics, found_folder, user, job, running)
    found = values(metrics)
    who = 'job_id="7",user="ann"'
    assert found[f'ictx_training_info{{{who},mlflow_run="abc",model="tiny",stage="pretrain"}}'] == 1
    assert found[f"ictx_training_running{{{who}}}"] == 1
    assert found[f"ictx_training_step{{{who}}}"] == 20
    assert found[f"ictx_training_loss{{{who}}}"] == 2.5
    assert found[f"ictx_training_validation_loss{{{who}}}"] == 3.1
    assert found[f"ictx_training_record_interval_seconds{{{who}}}"] == 30
    assert f"ictx_training_last_checkpoint_timestamp_seconds{{{who}}}" in found
    assert f"ictx_training_mfu_ratio{{{who}}}" not in found


def test_everything_that_dashboards_and_rules_ask_of_training_is_told(program: types.ModuleType) -> None:
    folders = [ROOT / "roles/grafana/files/dashboards", ROOT / "roles/prometheus/templates/rules"]
    asked = {
        name
        for folder in folders
        for file in folder.iterdir()
        for name in re.findall(r"(?<![\w:])ictx_training_\w+", file.read_text())
    }
    assert {f"ictx_training_{part}_seconds" for part in ("forward", "backward", "optimizer", "checkpoint")} <= asked
    told = {family.name for family in program.declared().registry.collect()}
    assert asked <= told


def test_a_loss_that_is_no_number_is_told_as_such(program: types.ModuleType, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    metrics = program.declared()
    program.gather_training(metrics, tmp_path, "ann", "7", True)
    loss = values(metrics)['ictx_training_loss{job_id="7",user="ann"}']
    assert loss != loss


def test_jobs_that_ended_long_ago_are_not_told(program: types.ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "ann" / "7" / "metrics.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"step": 1}\n')
    assert len(list(program.training_folders(tmp_path, set()))) == 1
    os.utime(file, (1, 1))
    assert list(program.training_folders(tmp_path, set())) == []
    assert len(list(program.training_folders(tmp_path, {("ann", "7")}))) == 1


def test_without_slurm_it_says_so_and_still_writes(
    program: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = values(program.gather(None))
    assert found["slurm_up{}"] == 0
    assert found["slurm_accounting_up{}"] == 0
    assert "the controllers do not answer" in capsys.readouterr().err


def test_a_program_that_fails_is_told_in_its_own_words(
    program: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {"scontrol": "true", "sinfo": "echo 'no controller' >&2; exit 1", "sacct": "true"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = values(program.gather(None))
    assert (found["slurm_up{}"], found["slurm_accounting_up{}"]) == (0, 1)
    assert "no controller" in capsys.readouterr().err
