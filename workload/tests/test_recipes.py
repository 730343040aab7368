"""The shipped recipes: they load, do what their comments say, and their positions are those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from ictx.model import ModelConfig
from ictx.model.hf_config import to_hf
from ictx.model.rope import attention_factor, inverse_frequencies
from ictx.train.config import load

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "pretrain").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_load(path: Path) -> None:
    config = load(str(path), [])
    assert config.run.model_name == f"ictx-{path.stem}"
    assert config.model == ModelConfig.named(path.stem)


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
