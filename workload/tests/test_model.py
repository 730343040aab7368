"""The model agrees with transformers' DeepSeek-V3, and wrong sizes are refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from ictx.errors import UserError
from ictx.model import ModelConfig, Transformer
from ictx.model.config import YarnConfig
from ictx.model.hf import export
from ictx.settings import build

CONFIGS = Path(__file__).parents[1] / "configs" / "model"
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "q_lora_rank": 24,
}
YARN = YarnConfig(factor=4, original_max_position_embeddings=64)


@pytest.fixture(params=[None, YARN], ids=["plain", "yarn"])
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Transformer, Path]:
    """A model with weights large enough to matter, and its export."""
    config = ModelConfig(**SMALL, max_position_embeddings=256, yarn=request.param, initializer_range=0.3)
    model = Transformer(config)
    model.init_weights(seed=7)
    tokenizer = tmp_path / "tokenizer.json"
    Tokenizer(BPE()).save(str(tokenizer))
    export(tmp_path / "hf", config, model.state_dict(), tokenizer, (0, "<eot>"), torch.float32)
    return model, tmp_path / "hf"


def test_logits_equal_those_of_transformers(exported: tuple[Transformer, Path]) -> None:
    model, directory = exported
    reference = AutoModelForCausalLM.from_pretrained(directory)
    assert isinstance(reference, DeepseekV3ForCausalLM)
    tokens = torch.randint(97, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model(tokens), reference(tokens).logits
    assert theirs.std() > 0.5, "logits this flat would agree by chance"
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_export_replaces_an_older_one_as_a_whole(exported: tuple[Transformer, Path]) -> None:
    model, directory = exported
    (directory / "stale").touch()
    export(directory, model.config, model.state_dict(), directory / "tokenizer.json", (0, "<eot>"), torch.float32)
    assert not (directory / "stale").exists()
    assert not directory.with_name("hf.part").exists()


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model = Transformer(ModelConfig(**SMALL))
    model.init_weights(seed=7)
    tokens = torch.arange(20)[None]
    changed = tokens.clone()
    changed[0, 10:] = 96
    torch.testing.assert_close(model(tokens)[:, :10], model(changed)[:, :10])
    assert not torch.allclose(model(tokens)[:, 10:], model(changed)[:, 10:])


def test_the_large_model_has_the_size_it_is_named_after() -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig.load(CONFIGS / "ictx-1b.yaml"))
    assert sum(weight.numel() for weight in model.parameters()) == 1_004_623_872


def test_tiny_keeps_the_widths_that_servers_need() -> None:
    tiny = ModelConfig.load(CONFIGS / "tiny.yaml")
    assert (tiny.kv_lora_rank, tiny.qk_rope_head_dim, tiny.qk_nope_head_dim, tiny.v_head_dim) == (512, 64, 128, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 0}, r"num_attention_heads is 0: expected more than 0"),
        ({"qk_rope_head_dim": 63}, r"qk_rope_head_dim is 63: expected an even number"),
        ({"hiden_size": 48}, r"unknown setting hiden_size: did you mean hidden_size\?"),
        ({"hidden_size": "wide"}, r"hidden_size is 'wide': expected int"),
        ({"hidden_size": True}, r"hidden_size is True: expected int"),
        (
            {"max_position_embeddings": 100, "yarn": dataclasses.asdict(YARN)},
            r"max_position_embeddings is 100: expected .* = 256",
        ),
        ({"yarn": {"factor": 2}}, r"missing setting yarn.original_max_position_embeddings"),
    ],
)
def test_wrong_sizes_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(ModelConfig, {**SMALL, **change})
