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
        "What waits, what runs, where, and what users have used.",
        {"node": 'label_values(slurm_node_state{cluster="$cluster"}, node)'},
    )
    up = [(float("-inf"), RED), (1.0, "green")]
    made = row(
        made,
        "Daemons",
        number("Controllers", "1 when slurmctld answers.", "none", f"max(slurm_up{{{ME}}})", up),
        number("Accounting", "1 when slurmdbd answers.", "none", f"max(slurm_accounting_up{{{ME}}})", up),
        number(
            "Longest wait",
            "For how long the job that has waited longest is in the queue.",
            "s",
            f"time() - min(slurm_job_pending_since_seconds{{{ME}}})",
            [(3600 * 6, YELLOW), (3600 * 24, RED)],
        ),
        number(
            "Nodes idle",
            "Compute nodes with nothing to do.",
            "none",
            f'count(slurm_node_state{{{ME},state="idle"}}) or vector(0)',
        ),
        number(
            "Nodes not available",
            "Compute nodes on which no job can start: down, drained or silent.",
            "none",
            f"count(slurm_node_available{{{ME}}} == 0) or vector(0)",
            [(1, RED)],
        ),
        number(
            "Messages for slurmdbd",
            "Records that the controller has not sent to the accounting database yet.",
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
            "Jobs of each user that wait or run.",
            "none",
            {"{{user}} {{state}}": f"sum by (user, state) (slurm_queue_jobs{{{ME}}})"},
        ),
        graph(
            "Why jobs wait",
            "Jobs that wait, by SLURM's reason.",
            "none",
            {"{{reason}}": f"sum by (reason) (slurm_jobs_pending_reason{{{ME}}})"},
        ),
        graph(
            "Running time of jobs",
            "How long each running job has run since its last start.",
            "s",
            {"{{job_id}} {{user}}": f"time() - slurm_job_running_since_seconds{{{ME}}}"},
        ),
        listing("Running jobs", "Each running job with its nodes.", f'slurm_job_node{{{ME},node=~"$node"}}'),
    )
    made = row(
        made,
        "Nodes",
        graph(
            "CPUs held",
            "CPUs that jobs hold, and all there are.",
            "none",
            {
                "held on {{node}}": f'slurm_node_allocated_cpus{{{ME},node=~"$node"}}',
                "all": f'sum(slurm_node_total_cpus{{{ME},node=~"$node"}})',
            },
        ),
        graph(
            "GPUs held",
            "GPUs that jobs hold.",
            "none",
            {"held on {{node}}": f'slurm_node_allocated_gpus{{{ME},node=~"$node"}}'},
        ),
        graph(
            "Memory held",
            "Memory that jobs hold.",
            "bytes",
            {"held on {{node}}": f'slurm_node_allocated_memory_bytes{{{ME},node=~"$node"}}'},
        ),
        listing(
            "Not available, since",
            "Nodes on which no job can start, for how long, and why.",
            f"time() - slurm_node_unavailable_since_seconds{{{ME}}}",
            "s",
            12,
        ),
    )
    made = row(
        made,
        "Accounting of the last 24 hours",
        graph(
            "Jobs that ended",
            "By state; FAILED and NODE_FAIL want a look.",
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
            "Threads of slurmctld (at most 256) and messages that wait to be sent to nodes.",
            "none",
            {"threads": f"slurm_scheduler_threads{{{ME}}}", "messages": f"slurm_scheduler_agent_queue_size{{{ME}}}"},
        ),
        graph(
            "Jobs since midnight (UTC)",
            "What the controller has counted.",
            "none",
            {
                name: f"slurm_scheduler_jobs_{name}{{{ME}}}"
                for name in ("submitted", "started", "completed", "canceled", "failed")
            },
        ),
        graph(
            "Rows left out",
            "What the exporter could not use, by source; `limits` is what exceeds a user's share.",
            "none",
            {"{{source}}": f"sum by (source) (ictx_slurm_skipped_rows{{{ME}}})"},
        ),
        graph(
            "Database",
            "Statements a second and connections of the accounting database.",
            "none",
            {
                "statements a second": f"rate(mysql_global_status_questions{{{ME}}}[5m])",
                "connections": f"mysql_global_status_threads_connected{{{ME}}}",
            },
        ),
    )
