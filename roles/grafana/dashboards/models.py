"""Registry and models: where images and models come from, and whether people can get at them."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from .panels import RED, YELLOW, graph, listing, mean, number, row, start

ME = 'cluster="$cluster"'


def build() -> Dashboard:
    """Returns the dashboard."""
    made = start(
        "models",
        "Registry & models",
        "The image registry, MLflow, and the training runs that make models.",
        {"model": 'label_values(ictx_training_info{cluster="$cluster"}, model)'},
    )
    made = row(
        made,
        "Endpoints",
        number(
            "Answering",
            "Share of endpoints that answer as they should.",
            "percentunit",
            f"avg(probe_success{{{ME}}})",
            [(float("-inf"), RED), (1.0, "green")],
            6,
        ),
        number("Slowest", "Longest answer.", "s", f"max(probe_duration_seconds{{{ME}}})", [(1, YELLOW), (5, RED)], 6),
        number(
            "First certificate to end",
            "Time until then.",
            "s",
            f"min(probe_ssl_earliest_cert_expiry{{{ME}}}) - time()",
            [(float("-inf"), RED), (14 * 86400, "green")],
            6,
        ),
        number(
            "Runs",
            "Training runs that report.",
            "none",
            f'count(ictx_training_info{{{ME},model=~"$model"}}) or vector(0)',
            width=6,
        ),
        graph("Answers", "1 while an endpoint answers.", "none", {"{{instance}}": f"probe_success{{{ME}}}"}, top=1),
        graph(
            "Time of an answer",
            "Seen from the Prometheus host.",
            "s",
            {"{{instance}}": f"probe_duration_seconds{{{ME}}}"},
        ),
    )
    made = row(
        made,
        "Image registry",
        number(
            "Registry",
            "1 while it exposes its metrics.",
            "none",
            f"min(registry_up{{{ME}}})",
            [(float("-inf"), RED), (1.0, "green")],
            6,
        ),
        number(
            "Requests that fail",
            "Share of requests within an hour with a 5xx answer.",
            "percentunit",
            f'(sum(rate(registry_http_requests_total{{{ME},code=~"5.."}}[1h])) or vector(0))'
            f" / sum(rate(registry_http_requests_total{{{ME}}}[1h]))",
            [(0.01, RED)],
            6,
        ),
        number(
            "Pulls and pushes",
            "Requests that are worked on now.",
            "none",
            f"sum(registry_http_in_flight_requests{{{ME}}})",
            width=6,
        ),
        number(
            "Space left",
            "On the file systems of its host, the fullest one.",
            "percentunit",
            f"1 - max(node:filesystem_used:ratio{{{ME}}} * on (cluster, node) group_left () registry_up)",
            [(float("-inf"), RED), (0.05, YELLOW), (0.2, "green")],
            6,
        ),
        graph(
            "Requests of images",
            "Requests a second, by what is requested and the answer: blobs are layers.",
            "reqps",
            {"{{handler}} {{code}}": f"sum by (handler, code) (rate(registry_http_requests_total{{{ME}}}[5m]))"},
        ),
        graph(
            "Time of a request of images",
            "Mean, by what is requested.",
            "s",
            {"{{handler}}": mean("registry_http_request_duration_seconds", "handler", ME)},
        ),
    )
    made = row(
        made,
        "MLflow",
        graph(
            "Requests",
            "Requests a second to the tracking server, by status.",
            "reqps",
            {"{{status}}": "sum by (status) (rate(mlflow_http_request_total[5m]))"},
        ),
        graph(
            "Time of a request",
            "Mean.",
            "s",
            {"{{method}}": mean("mlflow_http_request_duration_seconds", "method", "")},
        ),
    )
    return row(
        made,
        "Models",
        listing(
            "Runs",
            "Job, MLflow run, model and stage of what trains now or has just ended.",
            f'ictx_training_info{{{ME},model=~"$model"}}',
            width=12,
        ),
        listing("Pods that serve", "Which model each pod serves.", "vllm:num_requests_running", width=12),
    )
