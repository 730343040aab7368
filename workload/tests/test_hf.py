"""Round trips of checkpoints through transformers are bitwise exact; damage in a checkpoint is reported by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MOE, YARN, small
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer, DeepseekV3ForCausalLM, GenerationConfig

from ictx import folder
from ictx.errors import UserError
from ictx.model import Transformer, hf
from ictx.model.hf import load_pretrained, save_pretrained

END, PAD, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_end|>"
CHAT = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a tokenizer with end tokens of a document and of a turn, and a chat template."""
    made = tmp_path / "tokenizer"
    made.mkdir()
    vocabulary = Tokenizer(BPE())
    vocabulary.add_special_tokens([END, PAD, TURN_END])
    vocabulary.save(str(made / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD, "chat_template": CHAT}
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a model with experts, in several files."""
    save_pretrained(small(moe=MOE), tmp_path / "saved", max_shard_bytes=100_000)
    return tmp_path / "saved"


def equal(one: Transformer, other: Transformer) -> None:
    assert one.config == other.config
    for (name, a), (other_name, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == other_name
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"moe": MOE, "yarn": YARN}, {"q_lora_rank": None}], ids=str)
def test_the_round_trip_by_way_of_transformers_is_exact(
    changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = small(**changes)
    save_pretrained(model, tmp_path / "ours", dtype=dtype, max_shard_bytes=100_000)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists(), "the model must have several files"
    theirs, report = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_pretrained(tmp_path / "theirs")
    equal(back, load_pretrained(tmp_path / "ours"))
    if dtype == torch.float32:
        equal(back, model)


def test_biases_of_routers_stay_float32(tmp_path: Path) -> None:
    model = small(moe=MOE)
    save_pretrained(model, tmp_path / "half", dtype=torch.bfloat16)
    half = load_pretrained(tmp_path / "half")
    assert half.lm_head.weight.dtype == torch.bfloat16
    for ours, theirs in zip(model.routers, half.routers, strict=True):
        assert torch.equal(ours.e_score_correction_bias, theirs.e_score_correction_bias)
    assert load_pretrained(tmp_path / "half", dtype=torch.float32).lm_head.weight.dtype == torch.float32


def test_what_only_trains_is_not_exported(tmp_path: Path) -> None:
    model = small(moe=MOE, num_nextn_predict_layers=1)
    save_pretrained(model, tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors")
    assert not any(name.startswith("mtp") for name in names)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(load_pretrained(tmp_path / "saved")(tokens), model(tokens))


def test_a_published_checkpoint_s_older_settings_and_further_layers_are_read(saved: Path) -> None:
    """DeepSeek's files use the key `rope_scaling` for YaRN, and contain a layer of multi-token prediction."""
    content = json.loads((saved / "config.json").read_text())
    del content["rope_parameters"], content["dtype"]
    content["max_position_embeddings"] = 256
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
    content["rope_scaling"] = yarn
    content |= {"torch_dtype": "float32", "num_nextn_predict_layers": 1}
    (saved / "config.json").write_text(json.dumps(content))
    save_file({"model.layers.3.eh_proj.weight": torch.ones(2)}, saved / "further.safetensors")
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.3.eh_proj.weight"] = "further.safetensors"
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_pretrained(saved).config.yarn == YARN


def test_the_tokenizer_comes_along(tokenizer: Path, tmp_path: Path) -> None:
    save_pretrained(small(), tmp_path / "saved", tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.model_max_length == 256
    assert theirs.apply_chat_template([{"role": "user", "content": ""}], tokenize=False) == TURN_END
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == (0, 1)
    generation = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert generation.eos_token_id == [0, 2], "the end of a turn also ends generation"
    save_pretrained(small(), tmp_path / "again", theirs)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == 0
    save_pretrained(small(), tmp_path / "bare", tokenizer / "tokenizer.json", end_of_text=END)


def test_an_export_replaces_an_older_one_as_a_whole(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hf, "write_tensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(small(), saved)
    with monkeypatch.context() as patch:
        patch.setattr(folder, "sync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(small(), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    # A killed process leaves a partial folder, or the older one under another name.
    (saved.parent / "saved.part").mkdir()
    (saved / "stale").touch()
    saved.rename(saved.parent / "saved.old")
    save_pretrained(small(), saved)
    assert not (saved / "stale").exists()
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    assert load_pretrained(saved).config.moe is None


def first_file(saved: Path) -> Path:
    return sorted(saved.glob("*.safetensors"))[0]


def truncate(saved: Path) -> None:
    data = first_file(saved).read_bytes()
    first_file(saved).write_bytes(data[:-1000])


def cut_header(saved: Path) -> None:
    first_file(saved).write_bytes(first_file(saved).read_bytes()[:100])


def break_header(saved: Path) -> None:
    data = first_file(saved).read_bytes()
    first_file(saved).write_bytes(data[:8] + b"x" + data[9:])


def flip_bit(saved: Path) -> None:
    data = bytearray(first_file(saved).read_bytes())
    data[-1] ^= 1
    first_file(saved).write_bytes(data)


def change(saved: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(first_file(saved))
    edit(tensors)
    save_file(tensors, first_file(saved))


def drop_tensor(saved: Path) -> None:
    change(saved, lambda tensors: tensors.pop("model.embed_tokens.weight"))


def drop_tensor_and_its_entry(saved: Path) -> None:
    drop_tensor(saved)
    path = saved / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))


def reshape(saved: Path) -> None:
    change(saved, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(97, 47)}))


def add_tensor(saved: Path) -> None:
    change(saved, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(3)}))


def make_int64(saved: Path) -> None:
    change(saved, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(97, 48, dtype=torch.int64)}))


def make_fp8(saved: Path) -> None:
    quantised = torch.ones(97, 48).to(torch.float8_e4m3fn)
    change(saved, lambda tensors: tensors.update({"model.embed_tokens.weight": quantised}))


def change_header(saved: Path, new: bytes) -> None:
    data = first_file(saved).read_bytes()
    length = int.from_bytes(data[:8], "little")
    first_file(saved).write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def nest_header(saved: Path) -> None:
    change_header(saved, b"[" * 100_000)


def drop_file(saved: Path) -> None:
    first_file(saved).unlink()


def break_index(saved: Path) -> None:
    (saved / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model-00001-of-\d+.safetensors is truncated: tensor model\.\S+ ends beyond the end of the file"),
        (cut_header, r"model-00001-of-\d+.safetensors is truncated or not a safetensors file"),
        (break_header, r"model-00001-of-\d+.safetensors is corrupt: its header is not JSON"),
        (flip_bit, r"model-00001-of-\d+.safetensors is corrupt: tensor model\.\S+ has checksum .*: expected"),
        (drop_tensor, r"model-00001-of-\d+.safetensors: tensor model.embed_tokens.weight is missing, but"),
        (drop_tensor_and_its_entry, r"saved: tensor model.embed_tokens.weight is missing"),
        (reshape, r"tensor model.embed_tokens.weight has shape \(97, 47\): expected \(97, 48\)"),
        (add_tensor, r"tensor model.layers.0.self_attn.q_norm.weight does not belong to a model with this config.json"),
        (
            make_int64,
            r"model-00001-of-\d+.safetensors: tensor model.embed_tokens.weight has dtype I64: expected one of F32",
        ),
        (make_fp8, r"tensor model.embed_tokens.weight has dtype F8_E4M3: expected one of F32, BF16, F16"),
        (nest_header, r"model-00001-of-\d+.safetensors is corrupt: its header is not JSON"),
        (drop_file, r"model-00001-of-\d+.safetensors is missing"),
        (break_index, r"index.json is not an index of tensors: expected file names"),
    ],
)
def test_broken_files_are_named_with_the_tensor(saved: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(saved)
    with pytest.raises(UserError, match=message):
        load_pretrained(saved)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures is \['LlamaForCausalLM'\]: expected \['DeepseekV3"),
        ({"architectures": {}}, r"architectures is \{\}: expected \['DeepseekV3"),
        ({"attention_dropout": 0.1}, r"attention_dropout is 0.1: expected 0.0"),
        ({"head_dim": 128}, r"head_dim is 128: expected qk_rope_head_dim, 64"),
        ({"qk_head_dim": 128}, r"qk_head_dim is 128: expected qk_nope_head_dim \+ qk_rope_head_dim, 192"),
        ({"num_local_experts": 4}, r"num_local_experts is 4: expected n_routed_experts, 8"),
        ({"per_layer_config": {"0": {"v_head_dim": 64}}}, r"per_layer_config is given"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0.5: expected 1.0"),
        ({"rope_parameters": "yarn"}, r"rope_parameters is .yarn.: expected keys and values"),
        ({"dtype": ["float32"]}, r"dtype is \['float32'\]: expected one of float32"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale_all_dim": 1.0}},
            r"rope_scaling.mscale is missing, but mscale_all_dim is given",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 1.0, "mscale": 0.7}},
            r"yarn.mscale is 0.7: expected 1 if mscale_all_dim is 0",
        ),
        (
            {
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
                "original_max_position_embeddings": 32,
            },
            r"original_max_position_embeddings is 32: expected that of rope_parameters, 64",
        ),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings is True: expected False"),
        ({"num_key_value_heads": 1}, r"num_key_value_heads is 1: expected num_attention_heads, 2"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"rope_type is 'longrope': expected default or yarn"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.2}},
            r"rope_parameters.attention_factor is 1.2: expected None",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
            r"rope_parameters.truncate is False: expected True",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config is given"),
        ({"dtype": "float8"}, r"dtype is 'float8': expected one of float32"),
        ({"hidden_size": None}, r"hidden_size is None: expected int"),
        ({"num_experts_per_tok": 0}, r"moe.num_experts_per_tok is 0: expected 1 or more"),
    ],
)
def test_other_models_are_refused_by_name(saved: Path, setting: dict[str, Any], message: str) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(UserError, match=f"config.json: .*{message}"):
        load_pretrained(saved)


def test_a_file_whose_metadata_is_null_is_read(saved: Path) -> None:
    data = first_file(saved).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    change_header(saved, json.dumps(header | {"__metadata__": None}).encode())
    equal(load_pretrained(saved), small(moe=MOE))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json is missing: .* is not a model's folder"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        load_pretrained(tmp_path)


def test_files_say_that_they_are_pytorch_s(saved: Path) -> None:
    with safe_open(first_file(saved), framework="pt") as tensors:
        assert tensors.metadata()["format"] == "pt"
    shutil.rmtree(saved)
