"""The shipped recipes load, match their comments, and have transformers' position encoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from ictx.model import ModelConfig
from ictx.model.hf_config import to_hf
from ictx.model.rope import attention_factor, inverse_frequencies
from ictx.settings import build
from ictx.train.config import ExtendConfig, load, read
from ictx.train.extend import Extension
from ictx.train.init import Parent

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "pretrain").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_load(path: Path) -> None:
    config = load(str(path), [])
    assert config.run.model_name == f"ictx-{path.stem}"
    assert config.model == ModelConfig.named(path.stem)


@pytest.mark.parametrize(
    ("name", "parent", "longest"),
    [
        ("tiny-256", "tiny", 256),
        ("tiny", "tiny", 512),
        ("ictx-1b-128k", "ictx-1b", 1 << 20),
        ("ictx-1b-1m", "ictx-1b", 1 << 20),
    ],
)
def test_recipes_extend_the_models_that_recipes_pretrain(name: str, parent: str, longest: int) -> None:
    of = Parent("run:/x", "run:/x", f"ictx-{parent}", "", "", Path(), ModelConfig.named(parent))
    config = build(ExtendConfig, Extension.completed(read(f"extend/{name}.yaml", ["init=run:/x"]), of))
    assert config.model.max_position_embeddings == longest >= config.train.sequence_length
    assert config.model.yarn
    assert (
        config.model.yarn.original_max_position_embeddings == load(f"pretrain/{parent}.yaml", []).train.sequence_length
    )
    assert (config.run.model_name, config.run.experiment) == (f"ictx-{parent}", "extend")


@pytest.mark.parametrize(("name", "ranks"), [("ictx-1b", 4), ("ictx-1b-moe", 8)])
def test_large_recipes_are_an_epoch_of_the_specification_s_corpus(name: str, ranks: int) -> None:
    loop = load(f"pretrain/{name}.yaml", []).train
    step = ranks * loop.batch_size * loop.sequence_length
    assert step == 131_072
    assert loop.steps * step == pytest.approx(465e6, rel=1e-3)


@pytest.mark.parametrize("name", ["ictx-1b", "ictx-1b-128k", "ictx-1b-moe"])
def test_positions_of_large_models_are_those_of_transformers(name: str) -> None:
    config = ModelConfig.named(name)
    assert config.yarn
    length = config.yarn.original_max_position_embeddings
    assert config.rope_theta >= 0.0424 * length**1.628, "arXiv:2405.14591, figure 1"
    theirs = DeepseekV3RotaryEmbedding(DeepseekV3Config(**to_hf(config, torch.bfloat16)))
    torch.testing.assert_close(inverse_frequencies(config), theirs.inv_freq, rtol=1e-6, atol=0)
    assert attention_factor(config) == theirs.attention_scaling == 1
