"""GPU fleet, from dcgm-exporter."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from .panels import RED, YELLOW, graph, listing, number, row, start

ME = 'cluster="$cluster",node=~"$node"'
EACH = "{{node}} gpu {{gpu}}"


def build() -> Dashboard:
    """Returns the dashboard."""
    made = start(
        "gpu",
        "GPU fleet",
        "Utilisation, temperature and health of all GPUs. Utilisation is NVML's (a kernel is running), not MFU.",
        {"node": 'label_values(DCGM_FI_DEV_GPU_UTIL{cluster="$cluster"}, node)'},
    )
    made = row(
        made,
        "All",
        number("GPUs", "GPUs with metrics.", "none", f"count(DCGM_FI_DEV_GPU_UTIL{{{ME}}})"),
        number("Mean utilisation", "Of all GPUs.", "percentunit", f"avg(node:gpu_utilisation:avg{{{ME}}})"),
        number("Memory used", "Share of all GPU memory.", "percentunit", f"avg(node:gpu_memory_used:ratio{{{ME}}})"),
        number("Power", "Power of all GPUs.", "watt", f"sum(node:gpu_power_watts:sum{{{ME}}})"),
        number(
            "Hottest",
            "Temperature of the hottest GPU.",
            "celsius",
            f"max(DCGM_FI_DEV_GPU_TEMP{{{ME}}})",
            [(80, YELLOW), (85, RED)],
        ),
        number(
            "Uncorrectable errors",
            "Uncorrectable ECC memory errors since the driver was loaded.",
            "none",
            f"sum(DCGM_FI_DEV_ECC_DBE_VOL_TOTAL{{{ME}}})",
            [(1, RED)],
        ),
    )
    made = row(
        made,
        "Work",
        graph(
            "Utilisation",
            "Share of time in which a kernel was running; does not measure its efficiency.",
            "percent",
            {EACH: f"DCGM_FI_DEV_GPU_UTIL{{{ME}}}"},
            top=100,
        ),
        graph(
            "Utilisation by job",
            "Mean over the GPUs of each job's nodes.",
            "percentunit",
            {"{{job_id}} {{user}}": 'job:gpu_utilisation:avg{cluster="$cluster"}'},
            top=1,
        ),
        graph(
            "Tensor cores",
            "Share of cycles in which tensor cores were active; close to MFU.",
            "percentunit",
            {EACH: f"DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{{{ME}}}"},
            top=1,
        ),
        graph(
            "Memory bandwidth",
            "Share of cycles with memory transfers.",
            "percentunit",
            {EACH: f"DCGM_FI_PROF_DRAM_ACTIVE{{{ME}}}"},
            top=1,
        ),
        graph("Memory used", "Frame buffer in use.", "mbytes", {EACH: f"DCGM_FI_DEV_FB_USED{{{ME}}}"}),
        graph(
            "NVLink and PCIe",
            "Data sent by each GPU.",
            "Bps",
            {
                f"{EACH} PCIe": f"DCGM_FI_PROF_PCIE_TX_BYTES{{{ME}}}",
                f"{EACH} NVLink": f"DCGM_FI_PROF_NVLINK_TX_BYTES{{{ME}}}",
            },
        ),
    )
    return row(
        made,
        "Health",
        graph(
            "Temperature",
            "Above 85 °C a GPU is throttled.",
            "celsius",
            {EACH: f"DCGM_FI_DEV_GPU_TEMP{{{ME}}}"},
            [(80, YELLOW), (85, RED)],
        ),
        graph("Power", "Power of each GPU.", "watt", {EACH: f"DCGM_FI_DEV_POWER_USAGE{{{ME}}}"}),
        graph(
            "Clock",
            "Clock of the multiprocessors; a low clock under load is caused by heat or the power limit.",
            "hertz",
            {EACH: f"DCGM_FI_DEV_SM_CLOCK{{{ME}}} * 1e6"},
        ),
        graph(
            "Thermal throttling",
            "Share of time with thermal throttling.",
            "percentunit",
            {EACH: f"rate(DCGM_FI_DEV_THERMAL_VIOLATION{{{ME}}}[5m]) / 1e6"},
            [(0.01, RED)],
        ),
        listing(
            "Last error (Xid)",
            "Number of the last Xid of each GPU, 0 for none. See docs/runbooks/GpuXidError.md for their meaning.",
            f"DCGM_FI_DEV_XID_ERRORS{{{ME}}}",
            width=12,
        ),
        listing(
            "Rows remapped after uncorrectable errors",
            "Spare rows in use.",
            f"DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS{{{ME}}}",
            width=12,
        ),
    )
