"""Training run: one job from loss to hardware."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from .panels import RED, YELLOW, graph, listing, number, row, start

JOB = 'cluster="$cluster",job_id=~"$job"'
ME = f'{JOB},stage=~"$stage"'
BY = "{{stage}} {{job_id}} {{user}}"
PARTS = ("data", "forward", "backward", "optimizer", "ranks", "evaluation", "checkpoint")
ON_NODES = f"on (cluster, node) group_left (job_id) max by (cluster, node, job_id) (slurm_job_node{{{JOB}}})"


def build() -> Dashboard:
    """Returns the dashboard."""
    made = start(
        "training",
        "Training run",
        "A job of any stage, from its loss to its hardware. Jobs are SLURM's numbers; a run is MLflow's.",
        {
            "stage": 'label_values(ictx_training_info{cluster="$cluster"}, stage)',
            "run": 'label_values(ictx_training_info{cluster="$cluster",stage=~"$stage"}, mlflow_run)',
            "job": 'label_values(ictx_training_info{cluster="$cluster",stage=~"$stage",mlflow_run=~"$run"}, job_id)',
        },
    )
    made = row(
        made,
        "Now",
        number("Step", "Optimizer steps done.", "none", f"max(ictx_training_step{{{ME}}})"),
        number("Loss", "Training loss, nats per token.", "none", f"min(ictx_training_loss{{{ME}}})"),
        number("Tokens a second", "Of all ranks.", "none", f"sum(ictx_training_tokens_per_second{{{ME}}})"),
        number(
            "MFU",
            "Model FLOPS utilisation: useful operations, of what the hardware can do.",
            "percentunit",
            f"avg(ictx_training_mfu_ratio{{{ME}}})",
        ),
        number(
            "Last step",
            "How long ago the job logged a step.",
            "s",
            f"min(job:training_record_age:seconds{{{ME}}})",
            [(600, RED)],
        ),
        number(
            "Last checkpoint",
            "How long ago: this much would be lost now.",
            "s",
            f"min(job:training_checkpoint_age:seconds{{{ME}}})",
            [(1800, YELLOW), (3600, RED)],
        ),
        listing("Runs", "Job, user, MLflow run, model and stage.", f'ictx_training_info{{{ME},mlflow_run=~"$run"}}'),
    )
    made = row(
        made,
        "Learning",
        graph(
            "Loss",
            "Training and validation loss, nats per token.",
            "none",
            {BY: f"ictx_training_loss{{{ME}}}", f"{BY} validation": f"ictx_training_validation_loss{{{ME}}}"},
        ),
        graph(
            "Gradient norm",
            "Before clipping. A rise comes before most spikes of the loss.",
            "none",
            {BY: f"ictx_training_gradient_norm{{{ME}}}"},
        ),
        graph("Learning rate", "Of the optimizer.", "none", {BY: f"ictx_training_learning_rate{{{ME}}}"}),
        graph(
            "Reward margin",
            "DPO: how much more reward chosen answers get than rejected ones, relative to the first model.",
            "none",
            {
                BY: f"ictx_training_reward_margin{{{ME}}}",
                f"{BY} held out": f"ictx_training_validation_reward_margin{{{ME}}}",
            },
        ),
        graph(
            "Reward accuracy",
            "DPO: share of pairs whose chosen answer has the higher reward; 0.5 is chance.",
            "percentunit",
            {
                BY: f"ictx_training_reward_accuracy_ratio{{{ME}}}",
                f"{BY} held out": f"ictx_training_validation_reward_accuracy_ratio{{{ME}}}",
            },
            top=1,
        ),
        graph(
            "Steps",
            "Steps done. A step back is a restart from a checkpoint.",
            "none",
            {BY: f"ictx_training_step{{{ME}}}"},
        ),
    )
    made = row(
        made,
        "Speed",
        graph("Tokens a second", "Of all ranks.", "none", {BY: f"ictx_training_tokens_per_second{{{ME}}}"}),
        graph(
            "MFU and GPU utilisation",
            "MFU counts useful operations (causal: half of attention's square), utilisation only that a kernel ran.",
            "percentunit",
            {
                f"{BY} MFU": f"ictx_training_mfu_ratio{{{ME}}}",
                f"{BY} MFU, causal": f"ictx_training_mfu_causal_ratio{{{ME}}}",
                "{{job_id}} {{user}} GPU utilisation": f"job:gpu_utilisation:avg{{{JOB}}}",
            },
            top=1,
        ),
        graph("Time of a step", "From data to updated weights.", "s", {BY: f"ictx_training_step_seconds{{{ME}}}"}),
        graph(
            "Goodput",
            "Share of the last hour in which the job got on.",
            "percentunit",
            {BY: f"avg_over_time(job:training_progressing{{{ME}}}[1h])"},
            [(float("-inf"), RED), (0.9, "green")],
            top=1,
        ),
        graph(
            "Step breakdown",
            "Seconds of each part of a step on the first rank, the mean of the chosen jobs. Data to ranks make up the "
            "step: waiting for data, forward pass, backward pass with the sums of sharded gradients, clipping and the "
            "optimizer, and agreeing with the other ranks. Evaluation and checkpoints come between steps; the steps of "
            "a record share them.",
            "s",
            {part: f"avg(ictx_training_{part}_seconds{{{ME}}})" for part in PARTS},
            stacked=True,
        ).span(24),
    )
    made = row(
        made,
        "Safety",
        graph(
            "Age of the last checkpoint",
            "It falls to 0 with each checkpoint.",
            "s",
            {BY: f"job:training_checkpoint_age:seconds{{{ME}}}"},
            [(1800, YELLOW)],
        ),
        graph(
            "Age of the last record",
            "It grows when the job hangs.",
            "s",
            {BY: f"job:training_record_age:seconds{{{ME}}}"},
            [(600, RED)],
        ),
    )
    return row(
        made,
        "Its nodes",
        graph(
            "CPU",
            "CPU of the job's nodes.",
            "percentunit",
            {"{{node}}": f'node:cpu_utilisation:ratio{{cluster="$cluster"}} * {ON_NODES}'},
            top=1,
        ),
        graph(
            "GPU memory",
            "Memory of the job's GPUs.",
            "mbytes",
            {"{{node}} gpu {{gpu}}": f'DCGM_FI_DEV_FB_USED{{cluster="$cluster"}} * {ON_NODES}'},
        ),
        graph(
            "Network",
            "Received by the job's nodes.",
            "Bps",
            {"{{node}}": f'node:network_receive:rate5m{{cluster="$cluster"}} * {ON_NODES}'},
        ),
        graph(
            "GPU power",
            "Power of the job's GPUs.",
            "watt",
            {"{{node}} gpu {{gpu}}": f'DCGM_FI_DEV_POWER_USAGE{{cluster="$cluster"}} * {ON_NODES}'},
        ),
    )
