"""Serving: latency and errors, and their causes."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from .panels import RED, YELLOW, graph, mean, number, row, start

# Without requests a ratio is NaN; `>= 0` removes it, so that the panel shows "none".
ME = 'cluster="$cluster",model_name=~"$model"'
QUANTILES = ("p50", "p95", "p99")


def quantiles(name: str) -> dict[str, str]:
    """Returns the queries of a latency's quantiles, by legend."""
    return {f"{{{{model_name}}}} {quantile}": f"model:serving_{name}:{quantile}{{{ME}}}" for quantile in QUANTILES}


def build() -> Dashboard:
    """Returns the dashboard."""
    made = start(
        "serving",
        "Serving",
        "Latency and errors of served models, and their causes (queue, cache). Metrics of vLLM.",
        {"model": 'label_values(vllm:num_requests_running{cluster="$cluster"}, model_name)'},
    )
    made = row(
        made,
        "Objectives",
        number(
            "Errors, 1 hour",
            "Share of requests that failed; the objective is 0.5 %.",
            "percentunit",
            f"max(model:serving_errors:ratio_1h{{{ME}}}) >= 0",
            [(0.005, YELLOW), (0.072, RED)],
        ),
        number(
            "Error burn rate, 1 hour",
            "At 1 the error budget lasts a month, at 14.4 two days.",
            "none",
            f"max(model:serving_errors:ratio_1h{{{ME}}}) / 0.005 >= 0",
            [(6, YELLOW), (14.4, RED)],
        ),
        number(
            "Slow first tokens, 1 hour",
            "Share of requests that waited longer than 2.5 s; the objective is 5 %.",
            "percentunit",
            f"max(model:serving_slow_first_token:ratio_1h{{{ME}}}) >= 0",
            [(0.05, YELLOW), (0.3, RED)],
        ),
        number(
            "First token, p95",
            "95 % of requests receive their first token within this time.",
            "s",
            f"max(model:serving_time_to_first_token:p95{{{ME}}}) >= 0",
            [(2.5, RED)],
        ),
        number(
            "Tokens per second",
            "Tokens that all pods generate.",
            "none",
            f"sum(model:serving_generation_tokens:rate5m{{{ME}}})",
        ),
        number("Waiting", "Requests in the queue.", "none", f"sum(vllm:num_requests_waiting{{{ME}}})", [(10, YELLOW)]),
    )
    made = row(
        made,
        "Latency",
        graph(
            "Time to first token",
            "Time from the request to its first token.",
            "s",
            quantiles("time_to_first_token"),
            [(2.5, RED)],
        ),
        graph("Time between tokens", "Time from one token to the next.", "s", quantiles("inter_token_latency")),
        graph("Request latency", "Time from the request to its last token.", "s", quantiles("request_latency")),
        graph(
            "Time in the queue",
            "Mean waiting time of a request.",
            "s",
            {"{{model_name}}": mean("vllm:request_queue_time_seconds", "model_name", ME)},
        ),
    )
    made = row(
        made,
        "Load",
        graph(
            "Tokens per second",
            "Prompt tokens and generated tokens.",
            "none",
            {
                "{{model_name}} prompt": f"sum by (model_name) (rate(vllm:prompt_tokens_total{{{ME}}}[5m]))",
                "{{model_name}} generation": f"model:serving_generation_tokens:rate5m{{{ME}}}",
            },
        ),
        graph(
            "Requests",
            "Running and waiting requests of each pod.",
            "none",
            {
                "{{pod}} running": f"vllm:num_requests_running{{{ME}}}",
                "{{pod}} waiting": f"vllm:num_requests_waiting{{{ME}}}",
            },
            [(10, YELLOW)],
        ),
        graph(
            "Requests by finish reason",
            "Requests per second; stop and length are successful.",
            "reqps",
            {"{{finished_reason}}": f"sum by (finished_reason) (rate(vllm:request_success_total{{{ME}}}[5m]))"},
        ),
        graph(
            "Prompt length",
            "Mean number of tokens of a prompt.",
            "none",
            {"{{model_name}}": mean("vllm:request_prompt_tokens", "model_name", ME)},
        ),
    )
    return row(
        made,
        "Cache",
        graph(
            "KV cache",
            "Share of each pod's cache in use.",
            "percentunit",
            {"{{pod}}": f"vllm:kv_cache_usage_perc{{{ME}}}"},
            [(0.95, RED)],
            top=1,
        ),
        graph(
            "Preemptions",
            "Requests per second that are evicted from the cache and computed again.",
            "reqps",
            {"{{pod}}": f"rate(vllm:num_preemptions_total{{{ME}}}[5m])"},
            [(0.5, RED)],
        ),
        graph(
            "Prefix cache",
            "Share of prompt tokens found in the cache.",
            "percentunit",
            {
                "{{model_name}}": f"sum by (model_name) (rate(vllm:prefix_cache_hits_total{{{ME}}}[5m]))"
                f" / sum by (model_name) (rate(vllm:prefix_cache_queries_total{{{ME}}}[5m]))"
            },
            top=1,
        ),
        graph(
            "Error burn rate",
            "Burn rate over 5 minutes, 1 hour and 6 hours.",
            "none",
            {window: f"max(model:serving_errors:ratio_{window}{{{ME}}}) / 0.005" for window in ("5m", "1h", "6h")},
            [(6, YELLOW), (14.4, RED)],
        ),
    )
