"""Nodes and storage."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from .panels import RED, YELLOW, graph, listing, number, row, start

ME = 'cluster="$cluster",node=~"$node"'
EACH = "{{node}}"


def build() -> Dashboard:
    """Returns the dashboard."""
    made = start(
        "nodes",
        "Nodes & storage",
        "Processors, memory, disks, network and services of every node.",
        {"node": 'label_values(node_uname_info{cluster="$cluster"}, node)'},
    )
    made = row(
        made,
        "All",
        number("Nodes", "Nodes whose exporter responds.", "none", f'sum(up{{job="node",{ME}}})'),
        number("CPU", "Mean share of non-idle CPU time.", "percentunit", f"avg(node:cpu_utilisation:ratio{{{ME}}})"),
        number(
            "Memory",
            "Highest memory utilisation of a node.",
            "percentunit",
            f"max(node:memory_utilisation:ratio{{{ME}}})",
            [(0.9, YELLOW), (0.95, RED)],
        ),
        number(
            "Fullest file system",
            "Share in use.",
            "percentunit",
            f"max(node:filesystem_used:ratio{{{ME}}})",
            [(0.85, YELLOW), (0.95, RED)],
        ),
        number(
            "Services failed",
            "Units of the platform in the state failed.",
            "none",
            f'sum(node_systemd_unit_state{{{ME},state="failed"}})',
            [(1, RED)],
        ),
        number(
            "Clock",
            "Largest offset of a clock from its source.",
            "s",
            f"max(abs(node_timex_offset_seconds{{{ME}}}))",
            [(0.05, YELLOW)],
        ),
    )
    made = row(
        made,
        "Processors and memory",
        graph(
            "CPU",
            "Share of non-idle CPU time.",
            "percentunit",
            {EACH: f"node:cpu_utilisation:ratio{{{ME}}}"},
            top=1,
        ),
        graph("Load", "Running and waiting processes, mean of one minute.", "none", {EACH: f"node_load1{{{ME}}}"}),
        graph(
            "Memory",
            "Share in use, without caches.",
            "percentunit",
            {EACH: f"node:memory_utilisation:ratio{{{ME}}}"},
            [(0.95, RED)],
            top=1,
        ),
        graph(
            "OOM kills",
            "Processes that the kernel killed because of low memory, within 15 minutes.",
            "none",
            {EACH: f"increase(node_vmstat_oom_kill{{{ME}}}[15m])"},
            [(1, RED)],
        ),
    )
    made = row(
        made,
        "Storage",
        graph(
            "File systems",
            "Share in use.",
            "percentunit",
            {"{{node}} {{mountpoint}}": f"node:filesystem_used:ratio{{{ME}}}"},
            [(0.95, RED)],
            top=1,
        ),
        graph(
            "Busiest disk",
            "Share of time in which the disk was busy.",
            "percentunit",
            {EACH: f"node:disk_io_utilisation:ratio{{{ME}}}"},
            top=1,
        ),
        graph(
            "Disk throughput",
            "Bytes read and written by all disks.",
            "Bps",
            {
                "{{node}} read": f"sum by (node) (rate(node_disk_read_bytes_total{{{ME}}}[5m]))",
                "{{node}} written": f"sum by (node) (rate(node_disk_written_bytes_total{{{ME}}}[5m]))",
            },
        ),
        graph(
            "Free space",
            "Bytes available to users.",
            "bytes",
            {
                "{{node}} {{mountpoint}}": "max by (node, mountpoint) "
                f'(node_filesystem_avail_bytes{{{ME},fstype!~"tmpfs|ramfs"}})'
            },
        ),
    )
    made = row(
        made,
        "Central logs",
        graph(
            "Newest line",
            "Age of the newest line of each node in the central logs. It also grows if a node writes no lines; "
            "the alert NodeLogsMissing fires if lines are missing.",
            "s",
            {EACH: f"time() - ictx_logs_received_timestamp_seconds{{{ME}}}"},
        ),
        graph(
            "Space",
            "Disk space of each node's lines on the log receiver.",
            "bytes",
            {EACH: f"ictx_logs_received_bytes{{{ME}}}"},
        ),
    )
    return row(
        made,
        "Network and services",
        graph(
            "Network",
            "Received and sent traffic without virtual interfaces.",
            "Bps",
            {
                "{{node}} received": f"node:network_receive:rate5m{{{ME}}}",
                "{{node}} sent": f"node:network_transmit:rate5m{{{ME}}}",
            },
        ),
        graph(
            "Errors",
            "Packets with errors per second.",
            "pps",
            {
                EACH: f"sum by (node) (rate(node_network_receive_errs_total{{{ME}}}[5m]))"
                f" + sum by (node) (rate(node_network_transmit_errs_total{{{ME}}}[5m]))"
            },
            [(1, RED)],
        ),
        listing(
            "Services",
            "State of the platform's services.",
            f'node_systemd_unit_state{{{ME},state!="inactive"}} == 1',
            width=12,
        ),
        graph(
            "Clock",
            "Offset from the time source.",
            "s",
            {EACH: f"node_timex_offset_seconds{{{ME}}}"},
            [(0.05, YELLOW)],
        ),
    )
