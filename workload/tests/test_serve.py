"""Download and promotion of models from an MLflow store: complete, or an error of one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from tokenizers import Tokenizer
from tokenizers.models import BPE

from ictx.download import STATE_FILE, held_version
from ictx.errors import UserError
from ictx.model import ModelConfig, Transformer
from ictx.model.hf import write_pretrained
from ictx.registry import PROMOTED_TAG, SUMS_FILE, SUMS_TAG, ModelRef, format_sums, read_sums, sha256, write_sums
from ictx.serve.promote import promote
from ictx.serve.pull import pull
from ictx.track.mlflow import Tracker

NAME = "ictx-served"
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "q_lora_rank": 16}

Registered = Callable[..., str]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model in the format of training's export."""
    folder = tmp_path_factory.mktemp("exported")
    config = ModelConfig(num_attention_heads=1, max_position_embeddings=64, **SIZES)
    model = Transformer(config)
    model.init_weights(seed=3)
    Tokenizer(BPE()).save(str(folder / "tokenizer.json"))
    write_pretrained(folder / "model", config, model.state_dict(), folder / "tokenizer.json", torch.float32)
    return folder / "model"


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with empty tables, created once, since this takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def client(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A new store for each test."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def registered(client: MlflowClient, exported: Path, tmp_path: Path) -> Registered:
    """Returns a function that registers the model as a job does, after `change` of its folder; returns the version."""

    def register(change: Callable[[Path], object] = lambda _: None, name: str = NAME) -> str:
        run = tmp_path / "runs" / f"{len(list(tmp_path.glob('runs/*')))}"
        shutil.copytree(exported, run / "export")
        change(run / "export")
        return Tracker(run, "test", {}, patience=0).register(run / "export", name, "candidate")

    return register


def artifacts(client: MlflowClient, version: str) -> Path:
    """Returns the folder of a version's files in the store."""
    return Path(client.get_model_version_download_uri(NAME, version).removeprefix("file://"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("uri", [f"models:/{NAME}@candidate", f"models:/{NAME}/1"])
def test_a_pulled_model_is_the_exported_one(
    client: MlflowClient, registered: Registered, exported: Path, tmp_path: Path, uri: str
) -> None:
    registered()
    assert pull(client, ModelRef.parse(uri), tmp_path / "models" / "m") == "1"
    fetched = files(tmp_path / "models" / "m")
    assert fetched.pop(SUMS_FILE, None) is None, "the list of checksums is not part of the model"
    assert fetched == files(exported)
    assert [path.name for path in (tmp_path / "models").iterdir() if path.name != ".m.lock"] == ["m"]


def test_what_is_there_is_not_fetched_again_and_needs_no_server(
    client: MlflowClient, registered: Registered, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version, target = registered(), tmp_path / "m"
    pull(client, ModelRef(NAME, version=version), target)
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    shutil.rmtree(artifacts(client, version))
    pull(client, ModelRef(NAME, alias="candidate"), target)
    (tmp_path / "mlflow.db").unlink()
    pull(client, ModelRef(NAME, version=version), target)
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    assert "already" in capsys.readouterr().out


def test_a_file_that_changed_since_is_fetched_again(
    client: MlflowClient, registered: Registered, exported: Path, tmp_path: Path
) -> None:
    version, target = registered(), tmp_path / "m"
    pull(client, ModelRef(NAME, version=version), target)
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    pull(client, ModelRef(NAME, version=version), target)
    assert files(target) == files(exported)


@pytest.mark.parametrize("content", ["[]", "{", '{"name": "a", "version": "1", "sha256": ["config.json"]}'])
def test_a_state_file_of_another_form_holds_no_version(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE_FILE).write_text(content)
    assert held_version(tmp_path) is None


def test_a_link_in_place_of_a_file_is_replaced_by_the_file(
    client: MlflowClient, registered: Registered, exported: Path, tmp_path: Path
) -> None:
    target, ref = tmp_path / "models/champion", ModelRef(NAME, version=registered())
    pull(client, ref, target)
    (target / "config.json").unlink()
    (target / "config.json").symlink_to(exported / "config.json")
    pull(client, ref, target)
    assert not (target / "config.json").is_symlink()
    assert sha256(target / "config.json") == sha256(exported / "config.json")


def test_an_alias_that_moved_replaces_the_folder_as_a_whole(
    client: MlflowClient, registered: Registered, tmp_path: Path
) -> None:
    target = tmp_path / "m"
    registered(lambda folder: (folder / "old.txt").write_text("1"))
    assert pull(client, ModelRef(NAME, alias="candidate"), target) == "1"
    registered(lambda folder: (folder / "new.txt").write_text("2"))
    assert pull(client, ModelRef(NAME, alias="candidate"), target) == "2"
    assert (target / "new.txt").exists()
    assert not (target / "old.txt").exists()


def test_a_pull_that_was_killed_goes_on_where_it_was(
    client: MlflowClient, registered: Registered, exported: Path, tmp_path: Path
) -> None:
    version, target = registered(), tmp_path / "m"
    stored = artifacts(client, version)
    # The last file is a pipe without a writer, so its read blocks.
    last = stored / "tokenizer_config.json"
    content = last.read_bytes()
    last.unlink()
    os.mkfifo(last)
    command = [sys.executable, "-m", "ictx", "pull", f"models:/{NAME}/{version}", "--to", str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    for line in process.stdout:
        if "tokenizer.json" in line:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    last.unlink()
    last.write_bytes(content)
    assert not target.exists()
    kept = tmp_path / ".m.part" / "model.safetensors"
    before = kept.stat().st_mtime_ns
    pull(client, ModelRef(NAME, version=version), target)
    assert (target / "model.safetensors").stat().st_mtime_ns == before, "downloaded twice"
    assert files(target) == files(exported)


def test_two_pods_that_share_a_volume_take_turns(registered: Registered, exported: Path, tmp_path: Path) -> None:
    version, target = registered(), tmp_path / "m"
    command = [sys.executable, "-m", "ictx", "pull", f"models:/{NAME}/{version}", "--to", str(target)]
    pods = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [pod.communicate(timeout=600)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0], printed
    assert sorted("downloaded model.safetensors" in text for text in printed) == [False, True], printed
    assert files(target) == files(exported)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def set_config(folder: Path, **values: int) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("in_export", "in_store", "message"),
    [
        (lambda m: truncate(m / "model.safetensors"), None, r"model.safetensors is damaged \(.*\): promote another"),
        (
            None,
            lambda m: truncate(m / "model.safetensors"),
            "model.safetensors of version 1 does not have the checksum",
        ),
        (None, lambda m: (m / "config.json").write_text("{}"), "config.json of version 1 does not have the checksum"),
        (None, lambda m: (m / "tokenizer.json").unlink(), "version 1 lacks tokenizer.json, which its SHA256SUMS lists"),
        (None, lambda m: (m / SUMS_FILE).unlink(), "the SHA256SUMS of version 1 is missing"),
        (
            None,
            lambda m: (m / SUMS_FILE).write_text(""),
            "SHA256SUMS of version 1 does not have the checksum in the registry",
        ),
        (lambda m: (m / "model.safetensors").unlink(), None, r"has no \*.safetensors"),
        (lambda m: (m / "config.json").unlink(), None, "has no readable config.json"),
        (lambda m: (m / "config.json").write_text("[]"), None, "has a config.json without keys and values: promote"),
        (
            lambda m: set_config(m, kv_lora_rank=256, qk_rope_head_dim=32),
            None,
            "has kv_lora_rank 256, qk_rope_head_dim 32: vLLM serves latent attention with kv_lora_rank 512, qk_rope_",
        ),
    ],
)
def test_a_broken_model_is_refused_by_name_and_leaves_what_was_there(
    client: MlflowClient,
    registered: Registered,
    tmp_path: Path,
    in_export: Callable[[Path], object] | None,
    in_store: Callable[[Path], object] | None,
    message: str,
) -> None:
    target = tmp_path / "m"
    target.mkdir()
    (target / "config.json").write_text("an older version")
    version = registered(in_export or (lambda _: None))
    if in_store:
        in_store(artifacts(client, version))
    with pytest.raises(UserError, match=message) as error:
        pull(client, ModelRef(NAME, alias="candidate"), target)
    assert f"models:/{NAME}@candidate" in str(error.value)
    assert files(target) == {"config.json": b"an older version"}


def test_a_version_without_checksums_is_checked_by_size_and_structure(
    client: MlflowClient, registered: Registered, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = registered()
    (artifacts(client, version) / SUMS_FILE).unlink()
    client.delete_model_version_tag(NAME, version, "ictx.sha256sums")
    pull(client, ModelRef(NAME, version=version), tmp_path / "m")
    assert "registered without SHA256SUMS" in capsys.readouterr().out
    truncate(artifacts(client, version) / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        pull(client, ModelRef(NAME, version=version), tmp_path / "other")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (f"models:/{NAME}@champion", f"models:/{NAME}@champion does not exist: .*champion"),
        (f"models:/{NAME}/7", f"models:/{NAME}/7 does not exist"),
        ("models:/nothing@champion", "models:/nothing@champion does not exist"),
        (f"models:/{NAME}", "is not a model: expected models:/<name>@<alias> or models:/<name>/<version>"),
        ("runs:/0123/model", "is not a model"),
    ],
)
def test_what_is_not_registered_is_named(
    client: MlflowClient, registered: Registered, tmp_path: Path, uri: str, message: str
) -> None:
    registered()
    with pytest.raises(UserError, match=message):
        pull(client, ModelRef.parse(uri), tmp_path / "m")


def test_a_server_that_is_down_is_one_line_within_a_minute(tmp_path: Path) -> None:
    address = "http://127.0.0.1:9"  # port `discard`, without a server
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "ictx", "pull", f"models:/{NAME}@champion", "--to", str(tmp_path / "m")],
        env={**os.environ, "MLFLOW_TRACKING_URI": address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last == f"ictx: MLFLOW_TRACKING_URI is '{address}': connection refused (is the server running?)"
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 120


def test_promotion_moves_the_alias_and_says_what_it_was(client: MlflowClient, registered: Registered) -> None:
    registered()
    assert promote(client, "1", "champion") == f"models:/{NAME}@champion is version 1 now"
    registered()
    assert promote(client, "candidate", "champion") == f"models:/{NAME}@champion is version 2 now, was 1"
    assert client.get_model_version_by_alias(NAME, "champion").version == 2
    assert promote(client, "2", "champion") == f"models:/{NAME}@champion is version 2 already"
    with pytest.raises(UserError, match=f"models:/{NAME}/9 does not exist"):
        promote(client, "9", "champion")
    registered(name="ictx-other")
    with pytest.raises(UserError, match=f"set --model; registered models: ictx-other, {NAME}"):
        promote(client, "1", "champion")
    promote(client, "1", "champion", NAME)
    assert client.get_model_version_by_alias(NAME, "champion").version == 1


def change_weights(stored: Path) -> None:
    content = bytearray((stored / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (stored / "model.safetensors").write_bytes(content)


def rewrite_everything(stored: Path) -> None:
    """Replaces the files and their checksums, as the owner of a version can."""
    change_weights(stored)
    write_sums(stored)


@pytest.mark.attack(
    "H4",
    "the files of a promoted version and their list of checksums are replaced",
    before="served: the checksums were stored beside the files and in a tag that the version's owner may change",
    now="rejected with the file's name, using the checksums recorded at the promotion, which only promoters may write",
)
@pytest.mark.parametrize("change", [change_weights, rewrite_everything, lambda m: (m / "tokenizer.json").unlink()])
def test_what_changed_after_its_promotion_is_refused_by_name(
    client: MlflowClient, registered: Registered, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    version = registered()
    promote(client, version, "champion")
    pull(client, ModelRef(NAME, alias="champion"), tmp_path / "before", promoted=True)
    change(artifacts(client, version))
    digest = sha256(artifacts(client, version) / SUMS_FILE)
    client.set_model_version_tag(NAME, version, SUMS_TAG, digest)
    reason = rf"models:/{NAME}@champion: .*(model.safetensors|tokenizer.json).* its promotion recorded: .*promote"
    with pytest.raises(UserError, match=reason):
        pull(client, ModelRef(NAME, alias="champion"), tmp_path / "after", promoted=True)
    assert not (tmp_path / "after").exists()
    # A second promotion also rejects the new files.
    with pytest.raises(UserError, match="its promotion recorded"):
        promote(client, version, "stable")


def test_promotion_refuses_what_is_not_what_the_job_logged(client: MlflowClient, registered: Registered) -> None:
    version = registered()
    change_weights(artifacts(client, version))
    with pytest.raises(UserError, match="version 1 does not have the checksum in its SHA256SUMS"):
        promote(client, version, "champion")
    assert set(client.get_registered_model(NAME).aliases) == {"candidate"}
    assert PROMOTED_TAG not in client.get_model_version(NAME, version).tags


def test_a_server_refuses_a_version_that_nobody_promoted(
    client: MlflowClient, registered: Registered, tmp_path: Path
) -> None:
    version = registered()
    with pytest.raises(UserError, match=f"which was not promoted: run ictx promote {version} --alias"):
        pull(client, ModelRef(NAME, alias="candidate"), tmp_path / "m", promoted=True)
    promote(client, version, "champion")
    assert pull(client, ModelRef(NAME, version=version), tmp_path / "m", promoted=True) == version


def test_a_job_whose_names_belong_to_another_registers_under_its_own(
    client: MlflowClient, registered: Registered, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registered()
    create = MlflowClient.create_model_version

    def refuse(self: MlflowClient, name: str, *arguments: Any, **more: Any) -> Any:
        if name == NAME:
            raise MlflowException("Permission denied", PERMISSION_DENIED)
        return create(self, name, *arguments, **more)

    monkeypatch.setattr(MlflowClient, "create_model_version", refuse)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "bob")
    assert registered() == "1"
    assert f"{NAME} belongs to another user" in capsys.readouterr().out
    assert client.get_model_version_by_alias(f"{NAME}-bob", "candidate").version == 1
    assert client.get_model_version_by_alias(NAME, "candidate").version == 1


SUMS_LINES = st.lists(st.tuples(st.text("0123456789abcdefg", min_size=62, max_size=65), st.text(max_size=40)))


@given(st.one_of(st.text(), SUMS_LINES.map(lambda lines: "\n".join(f"{digest}  {path}" for digest, path in lines))))
def test_a_list_of_checksums_names_files_below_the_folder_or_is_refused(text: str) -> None:
    try:
        sums = read_sums(text)
    except UserError:
        return
    folder = Path("/models/m")
    for path, digest in sums.items():
        assert re.fullmatch("[0-9a-f]{64}", digest)
        assert os.path.normpath(folder / path).startswith(f"{folder}/")


def test_a_list_of_checksums_is_read_as_it_was_written() -> None:
    sums = {"config.json": "0" * 64, "a folder/model.safetensors": "f" * 64}
    assert read_sums(format_sums(sums)) == sums


def test_a_file_name_cannot_add_a_line_to_the_list() -> None:
    with pytest.raises(UserError, match="line break in its name"):
        format_sums({f"x\n{'0' * 64}  model.safetensors": "f" * 64})
