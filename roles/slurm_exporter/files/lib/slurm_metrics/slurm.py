"""Metrics from the output of SLURM's programs: nodes, jobs, scheduler, accounts. Supports SLURM 22.05 and later.

Users choose the names of their jobs, which SLURM does not escape. So fields and records are separated by a mark that is
random in each run: a name with a newline or with a fake record remains a name.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ClusterShell.NodeSet import expand

from .metrics import Metrics, Sample

# States in which a node runs or accepts jobs; `planned` is reserved for a job that starts soon.
FIT = ("idle", "mixed", "allocated", "completing", "planned", "reserved")
NODE_COLUMNS = {"NodeList": 64, "StateLong": 32, "CPUsState": 32, "Memory": 24, "AllocMem": 24}
NODE_COLUMNS |= {"Gres": 128, "GresUsed": 128, "Timestamp": 32, "Reason": 128}
# Names are truncated, because users choose their length and an array of 1,000 jobs would exhaust the memory limit.
JOB_FIELDS = ["%i", "%A", "%u", "%U", "%128P", "%T", "%D", "%V", "%S", "%r", "%N", "%128j"]
ACCOUNT_FIELDS = ["User", "UID", "Account", "State", "ElapsedRaw", "CPUTimeRAW", "AllocTRES", "JobIDRaw", "End"]
# Jobs with series of their own per user; the sums include all jobs.
JOBS_PER_USER = 500
JOB_COMMAND = ("squeue", "--noheader", "--array")
ACTIVE = ("RUNNING", "COMPLETING")
# Lines of sdiag: beginning of the line (of the main scheduler, then of backfill) → metric.
SDIAG = {
    "Server thread count": "threads",
    "Agent queue size": "agent_queue_size",
    "DBD Agent queue size": "dbd_queue_size",
    "Jobs submitted": "jobs_submitted",
    "Jobs started": "jobs_started",
    "Jobs completed": "jobs_completed",
    "Jobs canceled": "jobs_canceled",
    "Jobs failed": "jobs_failed",
}


def declare(metrics: Metrics) -> None:
    """Adds the gauges of SLURM, empty."""
    metrics.declare("slurm_up", "Whether the controllers respond.")
    metrics.declare("slurm_controller_up", "Whether a controller responds.", "controller", "role")
    metrics.declare("slurm_accounting_up", "Whether the accounting database responds.")
    metrics.declare("slurm_node_state", "1 for the current state of a node.", "node", "state")
    metrics.declare("slurm_node_available", "Whether jobs can start on the node.", "node")
    metrics.declare("slurm_node_unavailable_since_seconds", "Time when the reason was set.", "node", "state", "reason")
    for kind in ("cpus", "gpus", "memory_bytes"):
        metrics.declare(f"slurm_node_total_{kind}", f"Total {kind} of the node.", "node")
        metrics.declare(f"slurm_node_allocated_{kind}", f"Allocated {kind} of the node.", "node")
    metrics.declare("slurm_queue_jobs", "Jobs in the queue.", "partition", "user", "state")
    metrics.declare("slurm_jobs_pending_reason", "Pending jobs by reason.", "partition", "reason")
    who = ("job_id", "user", "partition")
    metrics.declare("slurm_job_pending_since_seconds", "Submission time of a pending job.", *who, "reason")
    metrics.declare("slurm_job_running_since_seconds", "Start time of a running job.", *who, "job_name")
    metrics.declare("slurm_job_nodes", "Allocated or requested nodes of a job.", *who, "state")
    metrics.declare("slurm_job_node", "1 for each node of a running job.", "job_id", "user", "node", "job_name")
    for name in SDIAG.values():
        metrics.declare(f"slurm_scheduler_{name}", f"sdiag: {name.replace('_', ' ')} (jobs: since midnight, UTC).")
    for name in ("main", "backfill"):
        metrics.declare(f"slurm_scheduler_{name}_last_cycle_seconds", "Duration of the last cycle.")
        metrics.declare(f"slurm_scheduler_{name}_mean_cycle_seconds", "Mean duration of a cycle.")
    metrics.declare("slurm_accounting_jobs", "Jobs that ended within 24 hours.", "user", "account", "state")
    metrics.declare("slurm_accounting_cpu_seconds", "CPU time within 24 hours.", "user", "account")
    metrics.declare("slurm_accounting_gpu_seconds", "GPU time within 24 hours.", "user", "account")


def query(*command: str, check: bool = True, **environment: str) -> str:
    """Returns the output of a program of SLURM. Raises OSError or subprocess.SubprocessError on failure."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=check,
        timeout=8,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C", **environment},
    )
    return done.stdout


def node_command() -> list[str]:
    """Returns the command that lists nodes."""
    columns = ",".join(f"{name}:{width}" for name, width in NODE_COLUMNS.items())
    return ["sinfo", "--noheader", "--Node", f"--Format={columns}"]


def job_format(mark: str) -> dict[str, str]:
    """Returns the variable that puts a mark before each job and between its fields.

    Not a command line option, which users can see, and could then rename a job before the controller responds.
    """
    return {"SQUEUE_FORMAT": f"{mark}:" + f"{mark},".join(JOB_FIELDS)}


def account_command(mark: str) -> list[str]:
    """Returns the command that lists the jobs of the last 24 hours; users control none of its fields."""
    table = ["--noheader", "--parsable2", f"--delimiter={mark}", "--allusers", "--allocations", "--starttime=now-1day"]
    return ["sacct", *table, f"--format={','.join(ACCOUNT_FIELDS)}"]


def number(text: str) -> float:
    """Returns a number in SLURM's output, 0 for unknown ones (`N/A`, `Unknown`)."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def gpus(gres: str) -> int:
    """Returns the GPUs in `gpu:2`, `gpu:a100:4(S:0-1)`, `gpu:1g.5gb:7,gpu:3g.20gb:2` or `gres/gpu=4`, else 0."""
    # In accounts the sum is listed beside the number of each type.
    if total := re.search(r"(?:^|,)gres/gpu=(\d+)", gres):
        return int(total[1])
    return sum(map(int, re.findall(r"(?:^|,)(?:gres/)?gpu(?::[^:=,()]+)?[:=](\d+)", gres)))


def gather_controllers(metrics: Metrics, text: str) -> None:
    """Sets the metrics of `scontrol ping`."""
    for role, controller, state in re.findall(r"Slurmctld\((\w+)\) at (\S+) is (\w+)", text):
        metrics.set("slurm_controller_up", float(state == "UP"), controller, role)


def node_samples(line: str) -> Iterator[Sample]:
    """Yields the samples of a line of sinfo; a node in several partitions has several lines."""
    row, start = {}, 0
    for name, width in NODE_COLUMNS.items():
        row[name] = line[start : start + width].strip()
        start += width
    node, state = row["NodeList"], row["StateLong"].rstrip("*~#!%$@^-")
    if not re.fullmatch(r"[\w.-]+", node):
        raise ValueError("invalid node name")
    # An asterisk after the state: the node does not respond.
    fit = state in FIT and not row["StateLong"].endswith("*")
    yield "slurm_node_state", 1, (node, state)
    yield "slurm_node_available", fit, (node,)
    if not fit:
        since = number(row["Timestamp"])
        yield "slurm_node_unavailable_since_seconds", since, (node, state, row["Reason"])
    busy, _, _, total = row["CPUsState"].split("/")
    for kind, has, held in (
        ("cpus", number(total), number(busy)),
        ("gpus", gpus(row["Gres"]), gpus(row["GresUsed"])),
        ("memory_bytes", number(row["Memory"]) * 2**20, number(row["AllocMem"]) * 2**20),
    ):
        yield f"slurm_node_total_{kind}", has, (node,)
        yield f"slurm_node_allocated_{kind}", held, (node,)


def gather_nodes(metrics: Metrics, text: str) -> None:
    """Sets the metrics of sinfo."""
    for line in filter(str.strip, text.split("\n")):
        with metrics.row("nodes", line[:64].strip()):
            metrics.take(node_samples(line))


@dataclass(frozen=True)
class Job:
    """A job in the queue. `number` is the name of its folder; `label` is its id for users (`7_1` in an array)."""

    label: str
    number: str
    user: str
    uid: int
    partition: str
    state: str
    nodes: float
    submitted: float
    start: float
    reason: str
    where: str
    name: str

    @classmethod
    def of(cls, record: str, mark: str) -> Job:
        """Returns the job of a record of squeue. Raises ValueError."""
        label, number_, user, uid, partition, state, nodes, submitted, start, reason, where, name = record.split(
            f"{mark},"
        )
        times = number(nodes), number(submitted), number(start)
        return cls(
            label, number_, user, int(uid), partition.rstrip(" "), state, *times, reason, where, name.rstrip(" ")
        )


def jobs_of(metrics: Metrics, text: str, mark: str) -> list[Job]:
    """Returns the jobs of squeue, running ones first."""
    jobs = []
    for record in text.split(f"{mark}:")[1:]:
        with metrics.row("jobs", record.split(f"{mark},")[0]):
            jobs.append(Job.of(record.removesuffix("\n"), mark))
    return sorted(jobs, key=lambda job: job.state not in ACTIVE)


def job_samples(job: Job) -> Iterator[Sample]:
    """Yields the series of one job."""
    who = (job.label, job.user, job.partition)
    yield "slurm_job_nodes", job.nodes, (*who, job.state.lower())
    if job.state == "PENDING":
        yield "slurm_job_pending_since_seconds", job.submitted, (*who, job.reason)
    if job.state == "RUNNING":
        yield "slurm_job_running_since_seconds", job.start, (*who, job.name)
        for node in expand(job.where):
            yield "slurm_job_node", 1, (job.label, job.user, node, job.name)


def gather_jobs(metrics: Metrics, jobs: Sequence[Job]) -> None:
    """Sets the metrics of squeue."""
    for labels, count in Counter((job.partition, job.user, job.state.lower()) for job in jobs).items():
        metrics.set("slurm_queue_jobs", count, *labels)
    waiting = Counter((job.partition, job.reason) for job in jobs if job.state == "PENDING")
    for labels, count in waiting.items():
        metrics.set("slurm_jobs_pending_reason", count, *labels)
    of_user: defaultdict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        of_user[job.user].append(job)
    for user, theirs in of_user.items():
        for job in theirs[:JOBS_PER_USER]:
            with metrics.row("jobs", job.label):
                metrics.take(job_samples(job))
        if more := len(theirs[JOBS_PER_USER:]):
            metrics.skip("limits", f"{more} jobs of {user} have no series of their own", more)


def gather_scheduler(metrics: Metrics, text: str) -> None:
    """Sets the metrics of sdiag; its times are microseconds."""
    main, _, backfill = text.partition("Backfilling stats")
    values = {key.strip(): value.split()[0] for key, value in re.findall(r"^\s*([^:\n]+):\s+(\S[^\n]*)$", main, re.M)}
    for key, name in SDIAG.items():
        metrics.set(f"slurm_scheduler_{name}", number(values.get(key, "0")))
    for part, name in ((main, "main"), (backfill, "backfill")):
        for word, which in (("Last", "last"), ("Mean", "mean")):
            found = re.search(rf"^\s*{word} cycle:\s+(\d+)", part, re.M)
            metrics.set(f"slurm_scheduler_{name}_{which}_cycle_seconds", number(found[1]) / 1e6 if found else 0)


@dataclass(frozen=True)
class Ended:
    """A job of the last 24 hours in the accounts; `end` is 0 while it runs."""

    user: str
    uid: int
    account: str
    state: str
    cpu_seconds: float
    gpu_seconds: float
    number: str
    end: float

    @classmethod
    def of(cls, line: str, mark: str) -> Ended:
        """Returns the job of a line of sacct. Raises ValueError or IndexError."""
        user, uid, account, state, elapsed, cpus, tres, number_, end = line.split(mark)
        word = state.split()[0].lower()
        return cls(user, int(uid), account, word, number(cpus), number(elapsed) * gpus(tres), number_, number(end))


def ended_jobs(metrics: Metrics, text: str, mark: str) -> list[Ended]:
    """Returns the jobs of sacct."""
    jobs = []
    for line in filter(None, text.split("\n")):
        with metrics.row("accounting", line.split(mark)[0]):
            jobs.append(Ended.of(line, mark))
    return jobs


def gather_accounts(metrics: Metrics, jobs: Iterable[Ended]) -> None:
    """Sets the usage of the last 24 hours."""
    ended: Counter[tuple[str, str, str]] = Counter()
    cpu: defaultdict[tuple[str, str], float] = defaultdict(float)
    gpu: defaultdict[tuple[str, str], float] = defaultdict(float)
    for job in jobs:
        if job.state not in ("pending", "running", "requeued", "suspended"):
            ended[job.user, job.account, job.state] += 1
        cpu[job.user, job.account] += job.cpu_seconds
        gpu[job.user, job.account] += job.gpu_seconds
    for labels, count in ended.items():
        metrics.set("slurm_accounting_jobs", count, *labels)
    for who, seconds in cpu.items():
        metrics.set("slurm_accounting_cpu_seconds", seconds, *who)
        metrics.set("slurm_accounting_gpu_seconds", gpu[who], *who)
