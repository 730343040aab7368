"""Fleet: overall state of the platform."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from .panels import RED, YELLOW, graph, listing, number, row, start

BAD_BELOW_1 = [(float("-inf"), RED), (1.0, "green")]


def build() -> Dashboard:
    """Returns the dashboard."""
    made = start("fleet", "Fleet", "Overall state of the platform.", {})
    made = row(
        made,
        "Health",
        number(
            "Alerts, critical",
            "Firing critical alerts; they require immediate action.",
            "none",
            'count(ALERTS{alertstate="firing",severity="critical"}) or vector(0)',
            [(1, RED)],
        ),
        number(
            "Alerts, warning",
            "Firing warnings; handle them within a day.",
            "none",
            'count(ALERTS{alertstate="firing",severity="warning"}) or vector(0)',
            [(1, YELLOW)],
        ),
        number(
            "Nodes up",
            "Share of the inventory's nodes whose exporter responds.",
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
            "Targets that Prometheus cannot scrape.",
            "none",
            'count(up{cluster="$cluster"} == 0) or vector(0)',
            [(1, RED)],
        ),
        number(
            "Endpoints up",
            "Share of endpoints (registry, MLflow, Prometheus …) with a successful probe.",
            "percentunit",
            'avg(probe_success{cluster="$cluster"})',
            BAD_BELOW_1,
        ),
    )
    made = row(
        made,
        "Usage",
        number(
            "Jobs running",
            "Running jobs.",
            "none",
            'sum(slurm_queue_jobs{cluster="$cluster",state="running"}) or vector(0)',
        ),
        number(
            "Jobs pending",
            "Pending jobs.",
            "none",
            'sum(slurm_queue_jobs{cluster="$cluster",state="pending"}) or vector(0)',
        ),
        number(
            "CPUs allocated",
            "Share of CPUs that are allocated to jobs.",
            "percentunit",
            'cluster:slurm_cpus_allocated:ratio{cluster="$cluster"}',
        ),
        number(
            "GPUs allocated",
            "Share of GPUs that are allocated to jobs.",
            "percentunit",
            'cluster:slurm_gpus_allocated:ratio{cluster="$cluster"}',
        ),
        number(
            "Training goodput, 1 day",
            "Share of time in which running training jobs made progress. The objective is 90 %.",
            "percentunit",
            'cluster:training_goodput:ratio_1d{cluster="$cluster"}',
            [(float("-inf"), RED), (0.9, "green")],
        ),
        number(
            "Tokens generated",
            "Tokens per second that all served models generate.",
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
            "Firing and pending alerts. The runbook of each is docs/runbooks/ALERT.md.",
            'ALERTS{alertname!="Watchdog"} or ALERTS{alertname="Watchdog"}',
        ),
    )
