"""Presets of GPUs, the memory estimate of a context, and shared memory for offloading."""

from __future__ import annotations

import json

import pytest
import yaml
from helm import CHARTS, Document, HelmError, component, pods, render


def argument(documents: list[Document], name: str) -> str | None:
    """Returns the value of a vLLM argument; None if it is not set."""
    args = next(pods([component(documents, "Deployment", "server")])).container("vllm")["args"]
    return args[args.index(name) + 1] if name in args else None


def fits(**values: object) -> bool:
    """Returns whether the chart accepts a context; if not, asserts that the error is about its size."""
    reason = ""
    try:
        render(CHARTS["serving"], values={name.replace("__", "."): value for name, value in values.items()})
    except HelmError as error:
        reason = str(error)
    assert not reason or "does not fit" in reason
    return not reason


def test_a_context_that_cannot_fit_is_refused_with_the_arithmetic() -> None:
    """Computed by hand for ictx-1b on a T4: the message, in GiB, and the longest context that fits."""
    gib = 2**30
    usable = 14.5 * 0.9
    weights = 1_004_623_872 * 2 / gib
    step = 2048 * 2 * (6 * 2048 + 3 * 5632) / gib
    prefill = 65_536 * 2 * (576 + 16 * 320) / gib
    left = usable - weights - step - prefill - 1.5
    most = int(left * gib / (576 * 16 * 2) / 16) * 16
    with pytest.raises(HelmError) as caught:
        render(CHARTS["serving"], values={"preset": "t4", "vllm.maxModelLen": 1_048_576})
    for number in (
        f"14.5 GiB x 0.9 = {usable:.2f} GiB", f"less {weights:.2f} for weights (1004623872 x 2 bytes / 1 GPUs)",
        f"{step:.2f} for a step of 2048 tokens", f"{prefill:.2f} for the workspace of a prefill",
        f"leaves {left:.2f} GiB of cache", "1048576 x 18432 bytes = 18.00 GiB", f"At most {most} tokens fit",
    ):  # fmt: skip
        assert number in str(caught.value)
    assert most == 516_832
    assert fits(preset="t4", vllm__maxModelLen=most)
    assert not fits(preset="t4", vllm__maxModelLen=most + 16)


@pytest.mark.parametrize("card", ["a100-40", "l40s", "a100-80", "h100", "h200"])
def test_a_million_tokens_fit_the_larger_cards(card: str) -> None:
    assert fits(preset=card, vllm__maxModelLen=1_048_576)


def test_the_arithmetic_knows_ranks_widths_and_other_models() -> None:
    large = {"parameters": 70_000_000_000, "layers": 60, "hidden": 7168, "intermediate": 18_432, "heads": 128,
             "latent": 576, "expanded": 320}  # fmt: skip
    model = {"model__name": "large", "model__sizes": large, "vllm__maxModelLen": 131_072}
    assert not fits(preset="h100", **model)
    assert fits(preset="h100", gpu__count=4, vllm__tensorParallelSize=4, **model)
    assert not fits(preset="t4", vllm__maxModelLen=700_000)
    assert fits(preset="t4", vllm__maxModelLen=700_000, vllm__kvCacheDtype="fp8")
    assert fits(preset="t4", model__name="unknown", vllm__maxModelLen=1_048_576), "sizes of the model are unknown"
    documents = render(CHARTS["serving"], values={"model.name": "large", "model.sizes": large})
    probe = next(pods([component(documents, "Deployment", "server")])).container("vllm")["startupProbe"]
    # 140 GB of weights at 100 MB/s take 23.3 minutes.
    assert probe["failureThreshold"] * probe["periodSeconds"] == (10 + 24) * 60


def test_a_preset_gives_what_the_values_leave_open() -> None:
    preset = render(CHARTS["serving"], values={"preset": "t4"})
    assert argument(preset, "--dtype") == "float16"
    assert argument(preset, "--max-num-batched-tokens") == "2048"
    spec = component(preset, "Deployment", "server")["spec"]["template"]["spec"]
    (term,) = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": "nvidia.com/gpu.product", "operator": "In", "values": ["Tesla-T4"]}]
    assert spec["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    own: Document = {
        "vllm.dtype": "bfloat16",
        "vllm.maxNumBatchedTokens": 512,
        "vllm.gpuMemoryUtilization": 0.5,
        "nodeSelector": {"nvidia.com/gpu.product": "X"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
    }
    documents = render(CHARTS["serving"], values={"preset": "h100", **own})
    given = [argument(documents, f"--{name}") for name in ("dtype", "max-num-batched-tokens", "gpu-memory-utilization")]
    assert given == ["bfloat16", "512", "0.5"]
    spec = component(documents, "Deployment", "server")["spec"]["template"]["spec"]
    assert "affinity" not in spec
    assert spec["tolerations"] == own["tolerations"]
    plain = render(CHARTS["serving"])
    assert argument(plain, "--gpu-memory-utilization") == "0.9"
    assert argument(plain, "--max-num-batched-tokens") is None


def test_a_card_before_ampere_refuses_bfloat16() -> None:
    presets = yaml.safe_load((CHARTS["serving"] / "files/presets.yaml").read_text())
    older = [card for card, about in presets.items() if about["capability"] < 8]
    assert older == ["t4"]
    for card in presets:
        values = {"preset": card, "vllm.dtype": "bfloat16"}
        if card not in older:
            assert argument(render(CHARTS["serving"], values=values), "--dtype") == "bfloat16"
            continue
        with pytest.raises(HelmError, match=rf"vllm.dtype bfloat16: a {card} .* set vllm.dtype to float16, or to auto"):
            render(CHARTS["serving"], values=values)
        assert argument(render(CHARTS["serving"], values=values | {"vllm.dtype": "auto"}), "--dtype") == "float16"


def test_what_is_offloaded_has_room_in_shared_memory() -> None:
    documents = render(CHARTS["serving"], values={"kvOffload.cpuGiB": 8})
    spec = component(documents, "Deployment", "server")["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["shm"]["emptyDir"]["sizeLimit"] == "9216Mi"
    assert argument(documents, "--kv-offloading-size") == "8"
    assert argument(documents, "--kv-offloading-backend") == "native"
    documents = render(CHARTS["serving"], values={"kvOffload": {"cpuGiB": 8, "diskClaim": "kv"}})
    config = json.loads(argument(documents, "--kv-transfer-config") or "")
    assert config["kv_connector_extra_config"] == {
        "spec_name": "TieringOffloadingSpec",
        "cpu_bytes_to_use": 8 * 2**30,
        "secondary_tiers": [{"type": "fs", "root_dir": "/kv"}],
    }
    assert argument(documents, "--kv-offloading-size") is None
