"""Adapters from an MLflow store, loaded into vLLM (`-m vllm`) or into a stub with vLLM's three paths."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from mlflow import MlflowClient
from models import small
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from ictx.download import write_state
from ictx.errors import UserError
from ictx.manifest import digest
from ictx.model import Transformer
from ictx.model.hf import write_pretrained
from ictx.registry import ModelRef
from ictx.serve import gate
from ictx.serve.adapters import READY, Adapters, Server, read_list
from ictx.serve.lora import BASE, CONFIG, check_adapter
from ictx.serve.promote import promote
from ictx.serve.register import register
from ictx.train.config import LoraConfig
from ictx.train.lora import adapt, init_adapter, merged, write_adapter

PYTHON = os.environ.get("ICTX_VLLM_PYTHON", "")
KEY = "k" * 40
TARGETS = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "q_lora_rank": 64}
PROMPT = [5, 250, 17, 99, 301, 4]
# vLLM's custom kernels for the CPU silently compute latent attention incorrectly.
VLLM = ["--dtype", "float32", "--enforce-eager", "--compilation-config", '{"custom_ops": ["none"]}']
VLLM += ["--max-model-len", "128", "--max-num-seqs", "4", "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]


class Trained:
    """A base model and its adapters, each in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base = folder, folder / "base"
        self.model = small(**SIZES)
        words = Tokenizer(WordLevel({f"t{number}": number for number in range(512)}, unk_token="t0"))
        words.pre_tokenizer = WhitespaceSplit()
        words.save(str(folder / "tokenizer.json"))
        weights = self.model.state_dict()
        write_pretrained(self.base, self.model.config, weights, folder / "tokenizer.json", torch.float32)
        write_state(self.base, "served", "1", {file.name: digest(file).sha256 for file in self.base.iterdir()})

    def adapter(self, name: str, seed: int, targets: list[str] | None = TARGETS) -> Path:
        """Writes an adapter as a run does, with large random weights."""
        config = LoraConfig(rank=4, alpha=16, targets=targets)
        model = Transformer(self.model.config)
        model.load_state_dict(self.model.state_dict())
        adapt(model, config)
        init_adapter(model, seed)
        torch.manual_seed(seed)
        for key, weight in model.named_parameters():
            if key.endswith(".lora_B"):
                torch.nn.init.normal_(weight, std=0.3)
        _, learned = merged(model.state_dict(), config)
        write_adapter(self.folder / name, learned, config, self.base, "served/1", torch.float32)
        return self.folder / name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, trained: Trained) -> Iterator[MlflowClient]:
    """A store with two promoted versions of one adapter and one version of another."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.chdir(folder)
        client = MlflowClient()
        for name, model, seed in (("a1", "support", 1), ("a2", "support", 2), ("b1", "sales", 3)):
            register(trained.adapter(name, seed), model, "candidate")
            promote(client, "candidate", f"seed{seed}", model)
        yield client


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "state").mkdir()
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "api-key").write_text(KEY)
    monkeypatch.setenv(gate.KEYS, str(tmp_path / "keys"))
    monkeypatch.setenv(gate.ADMIN, str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def wanted(tmp_path: Path) -> Callable[..., Path]:
    def write(**adapters: str) -> Path:
        (tmp_path / "adapters.yaml").write_text(json.dumps(adapters))
        return tmp_path / "adapters.yaml"

    return write


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def kept(registry: MlflowClient, trained: Trained, state: Path, tmp_path: Path) -> Callable[[str], Adapters]:
    def keep(url: str) -> Adapters:
        server = Server(url, state / gate.ADMIN_KEY)
        return Adapters(registry, server, tmp_path / "adapters.yaml", tmp_path / "files", trained.base, state, rank=8)

    return keep


@pytest.fixture
def stand_in(state: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A server with vLLM's adapter paths, behind the gate; yields its URL and the loaded adapters."""
    app, loaded = FastAPI(), dict[str, str]()

    @app.get("/v1/models")
    def models() -> Any:
        cards = [{"id": name, "root": root, "parent": "served"} for name, root in loaded.items()]
        return {"data": [{"id": "served", "root": "/models", "parent": None}, *cards]}

    @app.post(gate.LOAD)
    def load(body: dict[str, Any]) -> str:
        if body["lora_name"] in loaded and not body["load_inplace"]:
            raise HTTPException(400, "loaded already")
        loaded[body["lora_name"]] = body["lora_path"]
        return "Success"

    @app.post(gate.UNLOAD)
    def unload(body: dict[str, Any]) -> str:
        del loaded[body["lora_name"]]
        return "Success"

    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        app.add_middleware(gate.Gate)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", loaded
        server.should_exit = True
        thread.join()


def test_a_pass_loads_replaces_and_unloads(
    stand_in: tuple[str, dict[str, str]],
    kept: Callable[[str], Adapters],
    wanted: Callable[..., Path],
    registry: MlflowClient,
    tmp_path: Path,
) -> None:
    url, loaded = stand_in
    adapters = kept(url)
    adapters.open()
    wanted(help="models:/support@seed1", sell="models:/sales/1")
    assert adapters.update()
    assert loaded == {"help": str(tmp_path / "files/help/support.1"), "sell": str(tmp_path / "files/sell/sales.1")}
    wanted(help="models:/support@seed2")
    assert adapters.update()
    assert loaded == {"help": str(tmp_path / "files/help/support.2")}
    assert not (tmp_path / "files/sell").exists()
    assert [each.name for each in (tmp_path / "files/help").iterdir() if each.is_dir()] == ["support.2"]
    wanted(help="models:/sales/1")
    assert adapters.update()
    assert loaded == {"help": str(tmp_path / "files/help/sales.1")}
    loaded.clear()  # as after a restart of vLLM
    assert adapters.update()
    assert list(loaded) == ["help"]


def test_the_key_goes_past_a_proxy(
    stand_in: tuple[str, dict[str, str]], state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site's proxy for downloads (HTTP_PROXY in pull.extraEnv) must not get requests to the pod's own server."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    (state / gate.ADMIN_KEY).write_text(KEY)
    assert Server(stand_in[0], state / gate.ADMIN_KEY).loaded() == {}


def test_what_cannot_be_loaded_keeps_a_new_pod_from_clients_and_no_old_one(
    stand_in: tuple[str, dict[str, str]],
    kept: Callable[[str], Adapters],
    wanted: Callable[..., Path],
    state: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, loaded = stand_in
    adapters = kept(url)
    adapters.open()
    wanted(help="models:/support/1", lost="models:/nobody/1")
    assert not adapters.update()
    assert not adapters.update()
    assert capsys.readouterr().out.count("lost: models:/nobody/1 does not exist") == 1, "reported once"
    assert list(loaded) == ["help"], "the other adapters are served"
    (state / READY).touch()
    assert adapters.update()
    adapters.server.url = f"http://127.0.0.1:{free_port()}"
    assert not adapters.update()
    assert "the server does not respond" in capsys.readouterr().out


def test_clients_reach_no_path_that_loads(
    stand_in: tuple[str, dict[str, str]], kept: Callable[[str], Adapters], state: Path
) -> None:
    url, loaded = stand_in

    def status(path: str, key: str) -> int:
        request = urllib.request.Request(url + path, b'{"lora_name": "x", "lora_path": "/x", "load_inplace": true}')
        request.add_header("Authorization", f"Bearer {key}")
        request.add_header("Content-Type", "application/json")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        return caught.value.code

    for path in ("/v1/load_lora_adapter", "/v1/%6coad_lora_adapter", "/v1/unload_lora_adapter", "/adapters/x"):
        assert status(path, KEY) == 404
        assert status(path, "") == 401
    assert status(gate.LOAD, "") == 401, "there is no key yet"
    kept(url).open()
    assert status(gate.LOAD, KEY) == 404
    assert status(gate.LOAD, "another") == 401
    assert not loaded
    assert (state / gate.ADMIN_KEY).read_text() != KEY


def test_wrong_adapters_are_named(trained: Trained, tmp_path: Path) -> None:
    ref = ModelRef("support", version="1")
    good = trained.adapter("good", 5)
    check_adapter(ref, good, trained.base, 4)
    with pytest.raises(UserError, match=r"has rank 4, the server accepts 2: raise adapters\.maxRank"):
        check_adapter(ref, good, trained.base, 2)
    with pytest.raises(UserError, match="adapts kv_b_proj, which vLLM's latent attention ignores"):
        check_adapter(ref, trained.adapter("all", 5, targets=None), trained.base)
    with pytest.raises(UserError, match="is no adapter"):
        check_adapter(ref, trained.base)
    for file, text, message in (
        (CONFIG, "[]", r"is no adapter: .*adapter_config.json: no keys and values"),
        (CONFIG, '{"r": "4"}', "has no integer r"),
        (BASE, "[]", r"is no adapter: .*base.json: no keys and values"),
        (BASE, "{", r"is no adapter: .*base.json: Expecting"),
    ):
        broken = shutil.copytree(good, tmp_path / f"{file}-{len(text)}")
        (broken / file).write_text(text)
        with pytest.raises(UserError, match=message):
            check_adapter(ref, broken, trained.base, 4)
    other = shutil.copytree(trained.base, tmp_path / "base")
    write_state(other, "served", "2", {"model.safetensors": "0" * 64})
    with pytest.raises(UserError, match="was trained with served/1, but served/2 is served, which has other weights"):
        check_adapter(ref, good, other)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a", "expected lines NAME"), ("a/b: models:/x/1", "'a/b' is not a name"), ("a: x", "'x' is not a model"),
     ("a: [", "cannot be read"), ("1: models:/x/1", "1 is not a name")],
)  # fmt: skip
def test_a_wrong_list_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(UserError, match=message):
        read_list(tmp_path / "list")


@pytest.fixture
def vllm(trained: Trained, state: Path, tmp_path: Path) -> Iterator[str]:
    """Runs vLLM; yields its URL."""
    port = free_port()
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1", "OMP_NUM_THREADS": "2"}
    settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", trained.base, "--served-model-name"]
    command += ["served", "--host", "127.0.0.1", "--port", port, *VLLM, "--middleware", "ictx.serve.gate.Gate"]
    log = tmp_path / "vllm.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [str(word) for word in command], stdout=output, stderr=output, env=os.environ | settings
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 900
            while True:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def complete(url: str, model: str) -> list[float]:
    """Returns the log probabilities of the prompt's tokens, without the first, under a model."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("Authorization", f"Bearer {KEY}")
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=120) as answer:
        scores = json.load(answer)["choices"][0]["prompt_logprobs"][1:]
    return [score[str(token)]["logprob"] for score, token in zip(scores, PROMPT[1:], strict=True)]


@pytest.mark.vllm
@pytest.mark.skipif(not PYTHON, reason="ICTX_VLLM_PYTHON is not set")
def test_vllm_computes_with_an_adapter_what_peft_does(
    vllm: str, kept: Callable[[str], Adapters], wanted: Callable[..., Path], trained: Trained
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def expected(name: str | None) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float32)
        if name:
            model = PeftModel.from_pretrained(model, trained.folder / name)
        with torch.no_grad():
            scores = model(torch.tensor([PROMPT])).logits.log_softmax(-1)[0, :-1]
        return scores.gather(-1, torch.tensor(PROMPT[1:])[:, None])[:, 0]

    adapters = kept(vllm)
    adapters.open()
    wanted(help="models:/support@seed1", sell="models:/sales/1")
    assert adapters.update()
    assert set(adapters.server.loaded()) == {"help", "sell"}
    for model, name in (("served", None), ("help", "a1"), ("sell", "b1"), ("served", None)):
        torch.testing.assert_close(torch.tensor(complete(vllm, model)), expected(name), rtol=1e-4, atol=1e-4)
    assert (expected("a1") - expected(None)).abs().max() > 0.1, "the adapter has an effect"
    wanted(help="models:/support@seed2")
    assert adapters.update()
    torch.testing.assert_close(torch.tensor(complete(vllm, "help")), expected("a2"), rtol=1e-4, atol=1e-4)
    with pytest.raises(urllib.error.HTTPError) as caught:
        complete(vllm, "sell")
    assert caught.value.code == 404
