"""A checkpoint's tokenizer and generation settings are used and exported as in transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from models import small
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from ictx.cli import main
from ictx.errors import UserError
from ictx.infer.vocabulary import Vocabulary
from ictx.model.hf import save_pretrained

BEGIN, END = "<|begin|>", "<|endoftext|>"
CHAT = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model over bytes; its tokenizer adds a start token, and was saved with truncation enabled."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    vocabulary.add_special_tokens([BEGIN, END])
    vocabulary.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", special_tokens=[(BEGIN, 256)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=vocabulary, bos_token=BEGIN, eos_token=END, pad_token=END)
    wrapped.chat_template = CHAT
    wrapped("a longer text than that", truncation=True, max_length=8, padding="max_length")
    save_pretrained(small(vocab_size=258), tmp_path / "model", wrapped)
    assert json.loads((tmp_path / "model" / "tokenizer.json").read_text())["truncation"]["max_length"] == 8
    return tmp_path / "model"


def ictx(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ictx", *map(str, arguments)])
    return main()


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_prompt_has_the_tokens_that_transformers_gives_it(checkpoint: Path) -> None:
    ours, theirs = Vocabulary.load(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    text = "forty-nine characters and more, ünïcode, <|endoftext|> and all"
    assert ours.encode(text, chat=False) == theirs(text).input_ids
    assert len(ours.encode(text, chat=False)) > 49
    chat = theirs.apply_chat_template([{"role": "user", "content": text}], return_dict=True)["input_ids"]
    assert ours.encode(text, chat=True) == chat
    assert (chat[0], chat[-1]) == (256, 257)


@pytest.mark.parametrize("command", ["import", "export"])
def test_generation_settings_are_taken_over(
    checkpoint: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"eos_token_id": [0, 3, 7], "temperature": 0.6, "top_p": 0.95, "do_sample": True, "own": {"kept": 1}}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    rewrite(checkpoint / "config.json", bos_token_id=256, eos_token_id=[257, 3])
    assert Vocabulary.load(checkpoint).stop == {0, 3, 7}
    assert ictx(monkeypatch, command, "--checkpoint", checkpoint, "--out", tmp_path / "out") == 0
    theirs = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (theirs.eos_token_id, theirs.temperature, theirs.top_p, theirs.do_sample) == ([0, 3, 7], 0.6, 0.95, True)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == settings
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, [257, 3])


def test_another_tokenizer_s_tokens_end_generation(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(checkpoint / "generation_config.json", eos_token_id=[0, 3, 7])
    other = tmp_path / "other"
    other.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((checkpoint / name).read_bytes())
    arguments = ["export", "--checkpoint", checkpoint, "--tokenizer", other, "--out", tmp_path / "out"]
    assert ictx(monkeypatch, *arguments) == 0
    assert Vocabulary.load(tmp_path / "out").stop == {257}


@pytest.mark.parametrize(
    ("ends", "stop"), [({"eos_token_id": 5}, {5}), ({"eos_token_id": [5, 6]}, {5, 6}), ({"eos_token_id": None}, set())]
)
@pytest.mark.parametrize("settings", [None, {"temperature": 0.5}])
def test_config_json_ends_generation_where_nothing_else_does(
    checkpoint: Path, ends: dict[str, Any], stop: set[int], settings: dict[str, Any] | None
) -> None:
    rewrite(checkpoint / "config.json", **ends)
    (checkpoint / "generation_config.json").unlink()
    if settings:
        (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    assert Vocabulary.load(checkpoint).stop == stop


def test_a_key_that_is_absent_is_transformers_own(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    del config["eos_token_id"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert Vocabulary.load(checkpoint).stop == {1}


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    vocabulary.add_tokens(["more"])
    vocabulary.save(str(checkpoint / "tokenizer.json"))
    message = "has tokens up to number 258, but the model's vocab_size is 258"
    for command in (["generate", "--prompt", "more"], ["export", "--out", tmp_path / "out"]):
        assert ictx(monkeypatch, *command, "--checkpoint", checkpoint) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
).map(lambda value: json.dumps(value).encode())
NAMES = st.sampled_from(["eos_token_id", "pad_token_id", "bos_token_id", "eos_token", "bos_token", "chat_template"])
FILES = ["generation_config.json", "tokenizer_config.json", "tokenizer.json", "config.json", "special_tokens_map.json"]


@given(
    file=st.sampled_from(FILES),
    content=st.binary(max_size=30)
    | JSON
    | st.builds(lambda key, raw: b'{"%s": %s}' % (key.encode(), raw), NAMES, JSON),
)
@example(file="generation_config.json", content=b"{")
@example(file="generation_config.json", content=b'{"eos_token_id": [0, "1"]}')
@example(file="generation_config.json", content=b"[" * 100_000)
def test_damaged_files_are_one_line_that_names_them(
    tmp_path_factory: pytest.TempPathFactory, file: str, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "tokenizer.json").write_text(Tokenizer(models.BPE()).to_str())
    (folder / file).write_bytes(content)
    try:
        Vocabulary.load(folder)
    except UserError as error:
        assert str(folder / file) in str(error)
        assert "\n" not in str(error)
        assert len(str(error)) < 2000
