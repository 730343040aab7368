"""SLURM's exporter: on the output of SLURM's programs, and when they fail."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT
from hypothesis import given
from hypothesis import strategies as st
from slurm_exporter import PROGRAM, skipped, values, written

slurm = PROGRAM.slurm
MARK = "0123456789abcdef"


def node_line(*cells: str) -> str:
    """Returns a line of sinfo."""
    return "".join(cell.ljust(width) for cell, width in zip(cells, slurm.NODE_COLUMNS.values(), strict=True))


def squeue(*rows: str, mark: str = MARK) -> str:
    """Returns the output of squeue for rows separated by `|` (the name can contain it)."""
    return "".join(f"{mark}:" + f"{mark},".join(row.split("|", 11)) + "\n" for row in rows)


def with_jobs(*rows: str) -> Any:
    """Returns the metrics of a queue with these rows."""
    metrics = PROGRAM.declared()
    slurm.gather_jobs(metrics, slurm.jobs_of(metrics, squeue(*rows), MARK))
    return metrics


RUNNING = "7|7|ann|2001|batch|RUNNING|2|1700000000|1700000100|None|n[1-2]|"
PENDING = "8|8|ben|2002|batch|PENDING|1|1700000200|N/A|Resources||x"


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("(null)", 0),
        ("", 0),
        ("gpu:2", 2),
        ("gpu:a100:4(S:0-1)", 4),
        ("gpu:a100:1(IDX:0),gpu:h100:2(IDX:1-2)", 3),
        ("gpu:1g.5gb:7,gpu:3g.20gb:2", 9),
        ("gpu:1g.5gb:7(IDX:0-6),gpu:3g.20gb:2(IDX:7,8)", 9),
        ("billing=8,cpu=8,gres/gpu=4,mem=1G,node=1", 4),
        ("cpu=8,gres/gpu=4,gres/gpu:a100=4", 4),
        ("gres/gpu:2", 2),
        ("gres/shard:a:8,gpu_mem:4", 0),
    ],
)
def test_gpus_are_counted_in_all_of_slurms_notations(gres: str, count: int) -> None:
    assert slurm.gpus(gres) == count


def test_nodes_that_take_no_jobs_are_reported_with_the_reason() -> None:
    lines = [
        node_line("n1", "mixed", "1/1/0/2", "4096", "1024", "gpu:a100:4", "gpu:a100:1(IDX:0)", "Unknown", "none"),
        node_line("n2", "idle*", "0/2/0/2", "4096", "0", "(null)", "(null)", "1700000000", "Not responding"),
        node_line("n4", "planned", "0/2/0/2", "4096", "0", "(null)", "(null)", "Unknown", "none"),
        node_line("n3", "drained", "0/0/2/2", "4096", "0", "(null)", "(null)", "1700000005", "disk, by alice"),
    ]
    metrics = PROGRAM.declared()
    slurm.gather_nodes(metrics, "\n".join(lines))
    found = values(metrics)
    assert found['slurm_node_available{node="n1"}'] == 1
    assert found['slurm_node_allocated_gpus{node="n1"}'] == 1
    assert found['slurm_node_total_memory_bytes{node="n1"}'] == 4096 * 2**20
    assert found['slurm_node_available{node="n2"}'] == 0
    assert found['slurm_node_available{node="n4"}'] == 1, "the node is reserved for a job that starts soon"
    since = 'slurm_node_unavailable_since_seconds{node="n3",state="drained",reason="disk, by alice"}'
    assert found[since] == 1700000005


def test_a_reason_with_a_newline_costs_no_other_node(tmp_path: Path) -> None:
    lines = [
        node_line("n1", "drained", "0/0/2/2", "4096", "0", "(null)", "(null)", "1700000005", "one\ntwo"),
        node_line("n2", "idle", "0/2/0/2", "4096", "0", "(null)", "(null)", "Unknown", "none"),
    ]
    metrics = PROGRAM.declared()
    slurm.gather_nodes(metrics, "\n".join(lines))
    assert {'slurm_node_available{node="n1"}', 'slurm_node_available{node="n2"}'} <= set(values(metrics))
    assert skipped(metrics, tmp_path) == {"nodes": 1}


def test_jobs_are_reported_with_their_nodes_and_reasons() -> None:
    found = values(with_jobs(f"{RUNNING}name with | in it", PENDING))
    assert found['slurm_job_node{job_id="7",user="ann",node="n2",job_name="name with | in it"}'] == 1
    assert found['slurm_queue_jobs{partition="batch",user="ben",state="pending"}'] == 1
    waiting = 'slurm_job_pending_since_seconds{job_id="8",user="ben",partition="batch",reason="Resources"}'
    assert found[waiting] == 1700000200


@pytest.mark.attack(
    "H5",
    "names a job with a newline and what looks like another user's job behind it",
    before="the line was taken for a job, or no metric of SLURM was written",
    now="each run uses random separators, so that a name cannot contain one",
)
@pytest.mark.parametrize(
    "name",
    ["a\n9|9|ben|2002|batch|RUNNING|1|0|0|None|n9|b", f"a\n{MARK[::-1]}:9", "\ud800\udfff", "\x00\x1b[31m", "🐙|%j"],
)
def test_the_name_of_a_job_is_its_own_row_only(name: str, tmp_path: Path) -> None:
    metrics = with_jobs(RUNNING + name, PENDING)
    found = values(metrics)
    assert found['slurm_queue_jobs{partition="batch",user="ann",state="running"}'] == 1
    assert found['slurm_queue_jobs{partition="batch",user="ben",state="pending"}'] == 1
    assert len([key for key in found if key.startswith("slurm_job_node{")]) == 2
    assert skipped(metrics, tmp_path) == {}


def test_a_record_without_all_its_fields_costs_that_record(tmp_path: Path) -> None:
    metrics = with_jobs("9|9|ann|2001|batch|RUNNING", "10|10|ann|nobody|batch|RUNNING|1|1|1|None|n1|x", PENDING)
    assert values(metrics)['slurm_queue_jobs{partition="batch",user="ben",state="pending"}'] == 1
    assert skipped(metrics, tmp_path) == {"jobs": 2}


def test_of_a_user_with_very_many_jobs_some_have_series_of_their_own(tmp_path: Path) -> None:
    many = slurm.JOBS_PER_USER + 20
    jobs = [PENDING.replace("8|8", f"{number}|{number}", 1) for number in range(100, 100 + many)]
    metrics = with_jobs(*jobs, f"{RUNNING}x")
    found = values(metrics)
    assert found['slurm_queue_jobs{partition="batch",user="ben",state="pending"}'] == many
    assert len([key for key in found if key.startswith("slurm_job_nodes{")]) == slurm.JOBS_PER_USER + 1
    assert skipped(metrics, tmp_path) == {"limits": 20}


@pytest.mark.attack(
    "H5",
    "reads the separator in squeue's command line and renames a job before the controller answers",
    before="the name was taken for another user's job",
    now="the separator of jobs is in squeue's environment, which only its user can read",
)
def test_the_mark_is_another_one_in_each_run_and_in_no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def query(*command: str, check: bool = True, **environment: str) -> str:
        if command[0] == "squeue":
            seen.add(environment["SQUEUE_FORMAT"].partition(":")[0])
            assert not any(mark in word for word in command for mark in seen)
        return ""

    monkeypatch.setattr(slurm, "query", query)
    PROGRAM.gather(None)
    PROGRAM.gather(None)
    assert len(seen) == 2


def test_names_that_users_choose_are_cut_by_squeue() -> None:
    assert {field for field in slurm.JOB_FIELDS if field[-1] in "Pj"} == {"%128P", "%128j"}
    (job,) = slurm.jobs_of(
        PROGRAM.declared(), squeue(f"7|7|ann|2001|{'a,b'.ljust(128)}|RUNNING|1|0|0|None|n1|a b   "), MARK
    )
    assert (job.partition, job.name) == ("a,b", "a b")


def accounts(*lines: str) -> Any:
    """Returns the metrics for these lines of sacct."""
    metrics = PROGRAM.declared()
    slurm.gather_accounts(metrics, slurm.ended_jobs(metrics, "\n".join(lines).replace("|", MARK), MARK))
    return metrics


def test_accounts_add_up_time_and_leave_out_what_runs() -> None:
    found = values(
        accounts(
            "ann|2001|a|COMPLETED|100|400|cpu=4,gres/gpu=2|1|1700000000",
            "ann|2001|a|CANCELLED by 7|10|40|cpu=4|2|1700000000",
            "ann|2001|a|RUNNING|5|20|cpu=4,gres/gpu=1|3|Unknown",
        )
    )
    assert found['slurm_accounting_jobs{user="ann",account="a",state="cancelled"}'] == 1
    assert 'slurm_accounting_jobs{user="ann",account="a",state="running"}' not in found
    assert found['slurm_accounting_cpu_seconds{user="ann",account="a"}'] == 460
    assert found['slurm_accounting_gpu_seconds{user="ann",account="a"}'] == 205


def test_a_bad_line_of_the_accounts_costs_that_line(tmp_path: Path) -> None:
    metrics = accounts(
        "ann|2001|a|COMPLETED|1|4|cpu=4|1|1700000000",
        "ann|2001|a||1|4|cpu=4|1|1700000000",
        "ann|2001|a|FAILED|1",
        "ann|2001|a|COMPLETED|1|4|gres/gpu=" + "9" * 400 + "|1|0",
    )
    assert values(metrics)['slurm_accounting_jobs{user="ann",account="a",state="completed"}'] == 1
    assert skipped(metrics, tmp_path) == {"accounting": 3}


@given(st.text(), st.text(), st.text(), st.text())
def test_whatever_slurm_prints_the_file_is_valid(tmp_path_factory: Any, a: str, b: str, c: str, d: str) -> None:
    metrics = PROGRAM.declared()
    slurm.gather_controllers(metrics, a)
    slurm.gather_nodes(metrics, f"{a}\n{node_line(b[:9], c[:9], '1/1/0/2', d, a, b, c, d, a)}")
    slurm.gather_jobs(metrics, slurm.jobs_of(metrics, squeue(a, f"1|1|{b}|2001|p|RUNNING|{c}|{a}|{b}|r|n1|{d}"), MARK))
    slurm.gather_accounts(metrics, slurm.ended_jobs(metrics, MARK.join([a, "1", b, c, d, a, b, c, d]), MARK))
    with metrics.row("scheduler", "sdiag"):
        slurm.gather_scheduler(metrics, f"{a}\nJobs started: {b}\nBackfilling stats\n\tLast cycle: {c}")
    written(metrics, tmp_path_factory.mktemp("written"))


def test_everything_that_dashboards_and_rules_query_of_training_is_exposed() -> None:
    folders = [ROOT / "roles/grafana/files/dashboards", ROOT / "roles/prometheus/templates/rules"]
    queried = {
        name
        for folder in folders
        for file in folder.iterdir()
        for name in re.findall(r"(?<![\w:])ictx_training_\w+", file.read_text())
    }
    assert {f"ictx_training_{part}_seconds" for part in ("forward", "backward", "optimizer", "checkpoint")} <= queried
    exposed = {family.name for family in PROGRAM.declared().registry.collect()}
    assert queried <= exposed


def test_without_slurm_it_reports_so_and_still_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = values(PROGRAM.gather(None))
    assert found["slurm_up{}"] == 0
    assert found["slurm_accounting_up{}"] == 0
    assert "the controller does not respond" in capsys.readouterr().err


def test_a_program_that_fails_is_reported_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {"scontrol": "true", "sinfo": "echo 'no controller' >&2; exit 1", "sacct": "true"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = values(PROGRAM.gather(None))
    assert (found["slurm_up{}"], found["slurm_accounting_up{}"]) == (0, 1)
    assert "no controller" in capsys.readouterr().err


def test_output_that_is_no_utf_8_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "squeue").write_bytes(b"#!/bin/sh\nprintf 'a\\377b'\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert slurm.query("squeue") == "a\N{REPLACEMENT CHARACTER}b"


def test_no_name_is_one_of_schedmd_s() -> None:
    # From src/plugins/metrics/openmetrics/openmetrics.c of SLURM 26.05; names of users and accounts are prefixes.
    theirs = set((ROOT / "tests/monitoring/recorded/schedmd-metrics.txt").read_text().split())
    assert {"slurm_jobs", "slurm_node_cpus", "slurm_node_gpus", "slurm_node_memory_bytes"} <= theirs
    ours = {metric.name for metric in PROGRAM.declared().registry.collect()}
    assert "slurm_queue_jobs" in ours
    assert not ours & theirs
    assert not [name for name in ours if name.startswith(("slurm_user_", "slurm_account_", "slurm_partition_"))]
