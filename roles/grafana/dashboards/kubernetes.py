"""Kubernetes: nodes and pods, from the kubelets' own metrics."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from .panels import RED, graph, listing, number, row, start

EACH = "{{namespace}}/{{pod}}"
# K3s runs everything in one process: its kubelets expose the API server's metrics too.
REQUESTS = 'apiserver_request_total{job=~"kubernetes-.*-apiserver"'
PODS = 'namespace=~"$namespace",pod=~"$pod",container!=""'


def build() -> Dashboard:
    """Returns the dashboard."""
    made = start(
        "kubernetes",
        "Kubernetes",
        "Nodes and pods of the clusters that serve models, from the kubelets (cAdvisor) and the API server.",
        {
            "namespace": "label_values(container_memory_working_set_bytes, namespace)",
            "pod": 'label_values(container_memory_working_set_bytes{namespace=~"$namespace"}, pod)',
        },
    )
    made = row(
        made,
        "Cluster",
        number(
            "Nodes up",
            "Share of kubelets that respond.",
            "percentunit",
            'avg(up{job=~"kubernetes-.*-nodes"})',
            [(float("-inf"), RED), (1.0, "green")],
            6,
        ),
        number("Pods", "Running pods.", "none", "sum(kubelet_running_pods)", width=6),
        number(
            "Containers",
            "Running containers.",
            "none",
            'sum(kubelet_running_containers{container_state="running"})',
            width=6,
        ),
        number(
            "Failed API requests",
            "Share of requests to the API server with a 5xx response.",
            "percentunit",
            f'(sum(rate({REQUESTS},code=~"5.."}}[5m])) or vector(0)) / sum(rate({REQUESTS}}}[5m]))',
            [(0.01, RED)],
            6,
        ),
    )
    return row(
        made,
        "Pods",
        graph(
            "CPU",
            "CPUs that each pod uses.",
            "none",
            {EACH: f"sum by (namespace, pod) (rate(container_cpu_usage_seconds_total{{{PODS}}}[5m]))"},
        ),
        graph(
            "Memory",
            "Working set, which the kernel cannot reclaim.",
            "bytes",
            {EACH: f"sum by (namespace, pod) (container_memory_working_set_bytes{{{PODS}}})"},
        ),
        graph(
            "Starts",
            "Starts of containers within 15 minutes; more than three indicate a crash loop.",
            "none",
            {EACH: f"max by (namespace, pod) (changes(container_start_time_seconds{{{PODS}}}[15m]))"},
            [(3, RED)],
        ),
        listing(
            "Memory of containers",
            "Memory and node of each container.",
            f"sum by (node, namespace, pod, container) (container_memory_working_set_bytes{{{PODS}}})",
            "bytes",
            12,
        ),
    )
