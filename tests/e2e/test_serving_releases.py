"""In addition to the lab's model: an adapter, loaded and unloaded without a roll; a second model; a canary."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config
from lab import ROOT, STATE, Lab, wait_for
from serving import AUTHORITY, MODEL, RELEASE, SERVER, Client, endpoint, key
from test_router import helm, pods, upgrade

pytestmark = [pytest.mark.lab, pytest.mark.full]

ADAPTER, PROMPT = "ictx-tiny-test-adapter", [5, 250, 17, 99, 301, 4]
# Writes an adapter for the served version, as a run does, and computes references with transformers and PEFT.
MAKE = """
import json, sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ictx.model.hf import load_pretrained
from ictx.registry import ModelRef, new_client
from ictx.serve.pull import pull
from ictx.train.config import LoraConfig
from ictx.train.lora import adapt, init_adapter, merged, write_adapter

folder, uri, prompt = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
pull(new_client(), ModelRef.parse(uri), folder / "base")
targets = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj"]
config = LoraConfig(rank=4, alpha=16, targets=targets)
model = load_pretrained(folder / "base", dtype=torch.float32)
adapt(model, config)
init_adapter(model, 1)
torch.manual_seed(1)
for name, weight in model.named_parameters():
    if name.endswith(".lora_B"):
        torch.nn.init.normal_(weight, std=0.1)
write_adapter(folder / "adapter", merged(model.state_dict(), config)[1], config, folder / "base", uri, torch.float32)

def scores(model):
    with torch.no_grad():
        found = model(torch.tensor([prompt])).logits.log_softmax(-1)[0, :-1]
    return found.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()

base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
plain = scores(base)
print(json.dumps([plain, scores(PeftModel.from_pretrained(base, folder / "adapter"))]))
"""


def send(path: str, body: object = None) -> tuple[int, Any, str]:
    """Returns the status, the response, and the release that responded."""
    content = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key()}", "Content-Type": "application/json"}
    request = urllib.request.Request(endpoint() + path, content, headers)
    context = ssl.create_default_context(cafile=str(AUTHORITY))
    try:
        with urllib.request.urlopen(request, timeout=300, context=context) as answer:
            return answer.status, json.load(answer), answer.headers.get("x-ictx-served-by", "")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}"), ""


def listed() -> set[str]:
    """Returns the models that clients see."""
    try:
        status, answer, _ = send("/v1/models")
    except OSError:
        return set()
    return {card["id"] for card in answer["data"]} if status == 200 else set()


def scores(model: str) -> list[float]:
    """Returns the log probabilities of the prompt's tokens without the first."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0}
    status, answer, _ = send("/v1/completions", body)
    assert status == 200, answer
    found = answer["choices"][0]["prompt_logprobs"][1:]
    return [each[str(token)]["logprob"] for each, token in zip(found, PROMPT[1:], strict=True)]


def values() -> dict[str, Any]:
    """Returns the values of the lab's release."""
    found: dict[str, Any] = json.loads(helm("get", "values", RELEASE, "--output", "json"))
    return found


@pytest.fixture(scope="module")
def core() -> client.CoreV1Api:
    config.load_kube_config(str(STATE / "kubeconfig"))
    return client.CoreV1Api()


@pytest.fixture(scope="module", autouse=True)
def as_before() -> Iterator[None]:
    """Restores the release of the inventory at the end."""
    try:
        yield
    finally:
        playbook = [ROOT / ".venv/bin/ansible-playbook", "playbooks/serving.yml"]
        subprocess.run([str(word) for word in playbook], check=True, cwd=ROOT)


@pytest.fixture(scope="module")
def adapter(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """Registers and promotes an adapter; returns the log probabilities of transformers without it and PEFT with it."""
    folder = tmp_path_factory.mktemp("adapter")
    environment = {**os.environ, **lab.tracking()}

    def run(*command: object) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=folder, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    programs, uri = ROOT / ".venv-workload/bin", f"models:/{MODEL}/{values()['model']['version']}"
    made = run(programs / "python", "-c", MAKE, folder, uri, json.dumps(PROMPT))
    run(programs / "ictx", "register", folder / "adapter", "--model", ADAPTER)
    policy = ROOT / "workload/configs/promote-adapter.yaml"
    run(programs / "ictx", "promote", "candidate", "--alias", "champion", "--model", ADAPTER, "--policy", policy)
    found: list[list[float]] = json.loads(made.splitlines()[-1])
    return found


def test_an_adapter_is_loaded_used_and_unloaded_without_a_roll(
    core: client.CoreV1Api, adapter: list[list[float]]
) -> None:
    without, with_it = adapter
    assert max(abs(a - b) for a, b in zip(without, with_it, strict=True)) > 0.01, "the adapter has an effect"
    upgrade(**{"adapters.enabled": True, "adapters.seconds": 2})
    before = pods(core, SERVER)
    with Client() as steady:
        upgrade(**{"adapters.serve": [{"name": "support", "model": f"models:/{ADAPTER}@champion"}]})
        wait_for("the adapter", lambda: "support" in listed(), seconds=240)
        assert scores("support") == pytest.approx(with_it, abs=1e-3)
        assert scores(MODEL) == pytest.approx(without, abs=1e-3), "the base model is unchanged"
        status, _, _ = send("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/models"})
        assert status == 404, "clients cannot load adapters"
        upgrade(**{"adapters.serve": []})
        wait_for("its end", lambda: "support" not in listed(), seconds=240)
        assert send("/v1/completions", {"model": "support", "prompt": "x", "max_tokens": 1})[0] == 404
    assert steady.failures == []
    assert pods(core, SERVER) == before, "no pod was replaced"


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A second release with another model name; yields the file of its values."""
    mine = values() | {"service": {"type": "ClusterIP"}, "adapters": {"enabled": False}}
    mine["tls"] = {**mine["tls"], "existingSecret": ""}
    mine["model"] = {**mine["model"], "servedName": "ictx-second"}
    file = tmp_path_factory.mktemp("second") / "values.json"
    file.write_text(json.dumps(mine))
    helm("install", "next", ROOT / "charts/serving", "--values", file, "--wait", "--timeout", "15m")
    try:
        yield file
    finally:
        helm("uninstall", "next", "--wait")


def test_two_models_are_behind_one_address(second: Path) -> None:
    upgrade(**{"adapters.enabled": False, "router.backends": [{"service": "next-serving"}], "router.replicaCount": 1})
    wait_for("both models", lambda: {MODEL, "ictx-second"} <= listed(), seconds=300)
    for model, release in ((MODEL, "ictx-serving"), ("ictx-second", "next-serving")):
        status, answer, served_by = send("/v1/completions", {"model": model, "prompt": "def f(", "max_tokens": 2})
        assert (status, answer["model"], served_by) == (200, model, release)
    status, answer, _ = send("/v1/completions", {"model": "ictx-third", "prompt": "x"})
    assert status == 404
    assert f"served models are ictx-second, {MODEL}" in answer["error"]["message"]


def test_a_canary_gets_a_tenth_of_a_thousand_requests(second: Path, record_property: Any) -> None:
    helm("upgrade", "next", ROOT / "charts/serving", "--values", second, "--set", f"model.servedName={MODEL}", "--wait",
         "--timeout", "15m")  # fmt: skip
    upgrade(**{"router.backends": [], "canary": {"service": "next-serving", "weight": 10}})

    def release(_: int) -> str:
        body = {"model": MODEL, "prompt": "def f(", "max_tokens": 1, "temperature": 0}
        status, answer, served_by = send("/v1/completions", body)
        assert status == 200, answer
        return served_by

    wait_for("the canary", lambda: "next-serving" in {release(0) for _ in range(20)}, seconds=300)
    with ThreadPoolExecutor(8) as pool:
        shares = Counter(pool.map(release, range(1000)))
    record_property("requests", dict(shares))
    print(f"1,000 requests at 90/10: {dict(shares)}")
    assert 95 <= shares["next-serving"] <= 105
    assert shares.total() == 1000
    with Client() as steady:
        upgrade(canary={"service": "next-serving", "weight": 0})
        wait_for("nothing goes there", lambda: {release(0) for _ in range(20)} == {"ictx-serving"}, seconds=300)
    assert steady.failures == [], "the rollback loses no request"
