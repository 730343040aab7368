"""Registry and models: availability of images and models."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from .panels import RED, YELLOW, graph, listing, mean, number, row, start

ME = 'cluster="$cluster"'


def build() -> Dashboard:
    """Returns the dashboard."""
    made = start(
        "models",
        "Registry & models",
        "The image registry, MLflow, and the training runs that produce models.",
        {"model": 'label_values(ictx_training_info{cluster="$cluster"}, model)'},
    )
    made = row(
        made,
        "Endpoints",
        number(
            "Endpoints up",
            "Share of endpoints with a successful probe.",
            "percentunit",
            f"avg(probe_success{{{ME}}})",
            [(float("-inf"), RED), (1.0, "green")],
            6,
        ),
        number(
            "Slowest", "Longest response time.", "s", f"max(probe_duration_seconds{{{ME}}})", [(1, YELLOW), (5, RED)], 6
        ),
        number(
            "Certificate expiry",
            "Time until the first certificate expires.",
            "s",
            f"min(probe_ssl_earliest_cert_expiry{{{ME}}}) - time()",
            [(float("-inf"), RED), (14 * 86400, "green")],
            6,
        ),
        number(
            "Runs",
            "Training runs with metrics.",
            "none",
            f'count(ictx_training_info{{{ME},model=~"$model"}}) or vector(0)',
            width=6,
        ),
        graph(
            "Probes", "1 if an endpoint's probe succeeds.", "none", {"{{instance}}": f"probe_success{{{ME}}}"}, top=1
        ),
        graph(
            "Response time",
            "Measured from the Prometheus host.",
            "s",
            {"{{instance}}": f"probe_duration_seconds{{{ME}}}"},
        ),
    )
    made = row(
        made,
        "Image registry",
        number(
            "Registry",
            "1 if the registry exposes its metrics.",
            "none",
            f"min(registry_up{{{ME}}})",
            [(float("-inf"), RED), (1.0, "green")],
            6,
        ),
        number(
            "Failed requests",
            "Share of requests within an hour with a 5xx response.",
            "percentunit",
            f'(sum(rate(registry_http_requests_total{{{ME},code=~"5.."}}[1h])) or vector(0))'
            f" / sum(rate(registry_http_requests_total{{{ME}}}[1h]))",
            [(0.01, RED)],
            6,
        ),
        number(
            "Pulls and pushes",
            "Requests in progress.",
            "none",
            f"sum(registry_http_in_flight_requests{{{ME}}})",
            width=6,
        ),
        number(
            "Free space",
            "On the fullest file system of the registry's host.",
            "percentunit",
            f"1 - max(node:filesystem_used:ratio{{{ME}}} * on (cluster, node) group_left () registry_up)",
            [(float("-inf"), RED), (0.05, YELLOW), (0.2, "green")],
            6,
        ),
        graph(
            "Registry requests",
            "Requests per second by handler and status; blobs are layers.",
            "reqps",
            {"{{handler}} {{code}}": f"sum by (handler, code) (rate(registry_http_requests_total{{{ME}}}[5m]))"},
        ),
        graph(
            "Registry request duration",
            "Mean by handler.",
            "s",
            {"{{handler}}": mean("registry_http_request_duration_seconds", "handler", ME)},
        ),
    )
    made = row(
        made,
        "MLflow",
        graph(
            "Requests",
            "Requests per second to the tracking server by status.",
            "reqps",
            {"{{status}}": "sum by (status) (rate(mlflow_http_request_total[5m]))"},
        ),
        graph(
            "Request duration",
            "Mean by method.",
            "s",
            {"{{method}}": mean("mlflow_http_request_duration_seconds", "method", "")},
        ),
    )
    return row(
        made,
        "Models",
        listing(
            "Runs",
            "Job, MLflow run, model and stage of running and recently ended training jobs.",
            f'ictx_training_info{{{ME},model=~"$model"}}',
            width=12,
        ),
        listing("Serving pods", "Model of each serving pod.", "vllm:num_requests_running", width=12),
    )
