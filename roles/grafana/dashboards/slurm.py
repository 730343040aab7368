"""SLURM queue and accounting."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from .panels import RED, YELLOW, graph, listing, number, row, start

ME = 'cluster="$cluster"'


def build() -> Dashboard:
    """Returns the dashboard."""
    made = start(
        "slurm",
        "SLURM queue & accounting",
        "Pending and running jobs, nodes, and usage per user.",
        {"node": 'label_values(slurm_node_state{cluster="$cluster"}, node)'},
    )
    up = [(float("-inf"), RED), (1.0, "green")]
    made = row(
        made,
        "Daemons",
        number("Controllers", "1 if slurmctld responds.", "none", f"max(slurm_up{{{ME}}})", up),
        number("Accounting", "1 if slurmdbd responds.", "none", f"max(slurm_accounting_up{{{ME}}})", up),
        number(
            "Longest wait",
            "Waiting time of the job that has been pending longest.",
            "s",
            f"time() - min(slurm_job_pending_since_seconds{{{ME}}})",
            [(3600 * 6, YELLOW), (3600 * 24, RED)],
        ),
        number(
            "Nodes idle",
            "Idle compute nodes.",
            "none",
            f'count(slurm_node_state{{{ME},state="idle"}}) or vector(0)',
        ),
        number(
            "Nodes not available",
            "Compute nodes on which no job can start: down, drained or not responding.",
            "none",
            f"count(slurm_node_available{{{ME}}} == 0) or vector(0)",
            [(1, RED)],
        ),
        number(
            "Messages for slurmdbd",
            "Records that the controller has queued for the accounting database.",
            "none",
            f"max(slurm_scheduler_dbd_queue_size{{{ME}}})",
            [(100, YELLOW), (1000, RED)],
        ),
    )
    made = row(
        made,
        "Queue",
        graph(
            "Jobs by state",
            "Jobs in the queue.",
            "none",
            {"{{state}}": f"sum by (state) (slurm_queue_jobs{{{ME}}})"},
        ),
        graph(
            "Jobs by user",
            "Pending and running jobs of each user.",
            "none",
            {"{{user}} {{state}}": f"sum by (user, state) (slurm_queue_jobs{{{ME}}})"},
        ),
        graph(
            "Pending jobs by reason",
            "Pending jobs by SLURM's reason.",
            "none",
            {"{{reason}}": f"sum by (reason) (slurm_jobs_pending_reason{{{ME}}})"},
        ),
        graph(
            "Running time of jobs",
            "Time since the last start of each running job.",
            "s",
            {"{{job_id}} {{user}}": f"time() - slurm_job_running_since_seconds{{{ME}}}"},
        ),
        listing("Running jobs", "Each running job with its nodes.", f'slurm_job_node{{{ME},node=~"$node"}}'),
    )
    made = row(
        made,
        "Nodes",
        graph(
            "CPUs allocated",
            "CPUs that are allocated to jobs, and all CPUs.",
            "none",
            {
                "allocated on {{node}}": f'slurm_node_allocated_cpus{{{ME},node=~"$node"}}',
                "all": f'sum(slurm_node_total_cpus{{{ME},node=~"$node"}})',
            },
        ),
        graph(
            "GPUs allocated",
            "GPUs that are allocated to jobs.",
            "none",
            {"allocated on {{node}}": f'slurm_node_allocated_gpus{{{ME},node=~"$node"}}'},
        ),
        graph(
            "Memory allocated",
            "Memory that is allocated to jobs.",
            "bytes",
            {"allocated on {{node}}": f'slurm_node_allocated_memory_bytes{{{ME},node=~"$node"}}'},
        ),
        listing(
            "Unavailable nodes",
            "Nodes on which no job can start, with the duration and the reason.",
            f"time() - slurm_node_unavailable_since_seconds{{{ME}}}",
            "s",
            12,
        ),
    )
    made = row(
        made,
        "Accounting of the last 24 hours",
        graph(
            "Ended jobs",
            "By state; investigate FAILED and NODE_FAIL.",
            "none",
            {"{{state}}": f"sum by (state) (slurm_accounting_jobs{{{ME}}})"},
        ),
        graph(
            "CPU time",
            "CPU time of each user.",
            "s",
            {"{{user}}": f"sum by (user) (slurm_accounting_cpu_seconds{{{ME}}})"},
        ),
        graph(
            "GPU time",
            "GPU time of each user.",
            "s",
            {"{{user}}": f"sum by (user) (slurm_accounting_gpu_seconds{{{ME}}})"},
        ),
    )
    return row(
        made,
        "Scheduler",
        graph(
            "Cycles",
            "Duration of the scheduler's last cycle.",
            "s",
            {
                "main": f"slurm_scheduler_main_last_cycle_seconds{{{ME}}}",
                "main, mean": f"slurm_scheduler_main_mean_cycle_seconds{{{ME}}}",
                "backfill": f"slurm_scheduler_backfill_last_cycle_seconds{{{ME}}}",
                "backfill, mean": f"slurm_scheduler_backfill_mean_cycle_seconds{{{ME}}}",
            },
            [(5, YELLOW)],
        ),
        graph(
            "Threads and messages",
            "Threads of slurmctld (at most 256) and queued messages to nodes.",
            "none",
            {"threads": f"slurm_scheduler_threads{{{ME}}}", "messages": f"slurm_scheduler_agent_queue_size{{{ME}}}"},
        ),
        graph(
            "Jobs since midnight (UTC)",
            "Counters of the controller.",
            "none",
            {
                name: f"slurm_scheduler_jobs_{name}{{{ME}}}"
                for name in ("submitted", "started", "completed", "canceled", "failed")
            },
        ),
        graph(
            "Skipped rows",
            "Invalid rows that the exporter skipped, by source; `limits` are those above a user's limit.",
            "none",
            {"{{source}}": f"sum by (source) (ictx_slurm_skipped_rows{{{ME}}})"},
        ),
        graph(
            "Database",
            "Statements per second and connections of the accounting database.",
            "none",
            {
                "statements per second": f"rate(mysql_global_status_questions{{{ME}}}[5m])",
                "connections": f"mysql_global_status_threads_connected{{{ME}}}",
            },
        ),
    )
