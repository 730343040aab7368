"""Fleet: one look, is everything well?"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from .panels import RED, YELLOW, graph, listing, number, row, start

BAD_BELOW_1 = [(float("-inf"), RED), (1.0, "green")]


def build() -> Dashboard:
    """Returns the dashboard."""
    made = start("fleet", "Fleet", "One look: is everything well?", {})
    made = row(
        made,
        "Is everything well?",
        number(
            "Alerts, critical",
            "Critical alerts that fire now. Anything but 0 wants somebody at once.",
            "none",
            'count(ALERTS{alertstate="firing",severity="critical"}) or vector(0)',
            [(1, RED)],
        ),
        number(
            "Alerts, warning",
            "Warnings that fire now: to be looked at today.",
            "none",
            'count(ALERTS{alertstate="firing",severity="warning"}) or vector(0)',
            [(1, YELLOW)],
        ),
        number(
            "Nodes that answer",
            "Share of the inventory's nodes whose exporter answers.",
            "percentunit",
            'avg(up{job="node",cluster="$cluster"})',
            BAD_BELOW_1,
        ),
        number(
            "Compute nodes available",
            "Share of the compute nodes on which SLURM can start jobs.",
            "percentunit",
            'cluster:slurm_nodes_available:ratio{cluster="$cluster"}',
            BAD_BELOW_1,
        ),
        number(
            "Targets down",
            "Targets that Prometheus cannot read.",
            "none",
            'count(up{cluster="$cluster"} == 0) or vector(0)',
            [(1, RED)],
        ),
        number(
            "Endpoints that answer",
            "Share of the endpoints (registry, MLflow, Prometheus …) that answer as they should, seen from outside.",
            "percentunit",
            'avg(probe_success{cluster="$cluster"})',
            BAD_BELOW_1,
        ),
    )
    made = row(
        made,
        "Use",
        number(
            "Jobs running",
            "Jobs that run now.",
            "none",
            'sum(slurm_queue_jobs{cluster="$cluster",state="running"}) or vector(0)',
        ),
        number(
            "Jobs waiting",
            "Jobs in the queue.",
            "none",
            'sum(slurm_queue_jobs{cluster="$cluster",state="pending"}) or vector(0)',
        ),
        number(
            "CPUs held",
            "Share of the CPUs that jobs hold.",
            "percentunit",
            'cluster:slurm_cpus_allocated:ratio{cluster="$cluster"}',
        ),
        number(
            "GPUs held",
            "Share of the GPUs that jobs hold.",
            "percentunit",
            'cluster:slurm_gpus_allocated:ratio{cluster="$cluster"}',
        ),
        number(
            "Training goodput, 1 day",
            "Share of the time in which running training jobs got on. The objective is 90 %.",
            "percentunit",
            'cluster:training_goodput:ratio_1d{cluster="$cluster"}',
            [(float("-inf"), RED), (0.9, "green")],
        ),
        number(
            "Tokens generated",
            "Tokens a second that all served models generate.",
            "none",
            'sum(model:serving_generation_tokens:rate5m{cluster="$cluster"})',
        ),
    )
    return row(
        made,
        "Over time",
        graph(
            "CPU of the nodes",
            "Share of each node's CPU time that is not idle.",
            "percentunit",
            {"{{node}}": 'node:cpu_utilisation:ratio{cluster="$cluster"}'},
            top=1,
        ),
        graph(
            "Jobs",
            "Jobs in the queue, by state.",
            "none",
            {"{{state}}": 'cluster:slurm_jobs:sum{cluster="$cluster"}'},
        ),
        listing(
            "Alerts",
            "All alerts that fire or are about to. Each one's runbook is docs/runbooks/ALERT.md.",
            'ALERTS{alertname!="Watchdog"} or ALERTS{alertname="Watchdog"}',
        ),
    )
