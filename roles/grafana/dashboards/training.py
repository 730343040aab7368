"""Training run: a job's loss, speed and hardware."""

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
        "Loss, speed and hardware of a training job. `job` is SLURM's number, `run` is MLflow's id.",
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
        number("Tokens per second", "Sum of all ranks.", "none", f"sum(ictx_training_tokens_per_second{{{ME}}})"),
        number(
            "MFU",
            "Model FLOPS utilisation: useful operations relative to the hardware's peak.",
            "percentunit",
            f"avg(ictx_training_mfu_ratio{{{ME}}})",
        ),
        number(
            "Last step",
            "Time since the last logged step.",
            "s",
            f"min(job:training_record_age:seconds{{{ME}}})",
            [(600, RED)],
        ),
        number(
            "Last checkpoint",
            "Time since the last checkpoint, i.e. the work that a crash would lose.",
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
            "Before clipping. It rises before most loss spikes.",
            "none",
            {BY: f"ictx_training_gradient_norm{{{ME}}}"},
        ),
        graph("Learning rate", "Learning rate of the optimizer.", "none", {BY: f"ictx_training_learning_rate{{{ME}}}"}),
        graph(
            "Reward margin",
            "DPO: reward of chosen minus rejected answers, relative to the initial model.",
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
            "Completed steps. A decrease is a restart from a checkpoint.",
            "none",
            {BY: f"ictx_training_step{{{ME}}}"},
        ),
    )
    made = row(
        made,
        "Speed",
        graph("Tokens per second", "Sum of all ranks.", "none", {BY: f"ictx_training_tokens_per_second{{{ME}}}"}),
        graph(
            "MFU and GPU utilisation",
            "MFU counts useful operations (causal: half of attention's square), utilisation any running kernel.",
            "percentunit",
            {
                f"{BY} MFU": f"ictx_training_mfu_ratio{{{ME}}}",
                f"{BY} MFU, causal": f"ictx_training_mfu_causal_ratio{{{ME}}}",
                "{{job_id}} {{user}} GPU utilisation": f"job:gpu_utilisation:avg{{{JOB}}}",
            },
            top=1,
        ),
        graph("Step time", "From loading data to updated weights.", "s", {BY: f"ictx_training_step_seconds{{{ME}}}"}),
        graph(
            "Goodput",
            "Share of the last hour in which the job made progress.",
            "percentunit",
            {BY: f"avg_over_time(job:training_progressing{{{ME}}}[1h])"},
            [(float("-inf"), RED), (0.9, "green")],
            top=1,
        ),
        graph(
            "Step breakdown",
            "Seconds of each part of a step on the first rank, mean of the selected jobs. A step consists of data to "
            "ranks: waiting for data, forward pass, backward pass with reduction of sharded gradients, clipping and "
            "optimizer, and synchronisation with the other ranks. Evaluation and checkpoints run between steps; their "
            "time is divided by the steps of a record.",
            "s",
            {part: f"avg(ictx_training_{part}_seconds{{{ME}}})" for part in PARTS},
            stacked=True,
        ).span(24),
    )
    made = row(
        made,
        "Checkpoints and progress",
        graph(
            "Age of the last checkpoint",
            "Returns to 0 with each checkpoint.",
            "s",
            {BY: f"job:training_checkpoint_age:seconds{{{ME}}}"},
            [(1800, YELLOW)],
        ),
        graph(
            "Age of the last record",
            "Grows if the job hangs.",
            "s",
            {BY: f"job:training_record_age:seconds{{{ME}}}"},
            [(600, RED)],
        ),
    )
    return row(
        made,
        "Nodes of the job",
        graph(
            "CPU",
            "CPU utilisation of the job's nodes.",
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
            "Traffic that the job's nodes receive.",
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
