"""config.json without some keys: read as transformers does, or rejected by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import SMALL, small
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedConfig

from ictx.errors import UserError
from ictx.model import MoeConfig, Transformer
from ictx.model.hf import load_pretrained, save_pretrained
from ictx.model.hf_config import DEFAULT_TOKENS, DEFAULTS, FIXED

TOKENS = torch.randint(SMALL["vocab_size"], (2, 200), generator=torch.Generator().manual_seed(1))
MOE = MoeConfig(
    n_routed_experts=16,
    num_experts_per_tok=8,
    moe_intermediate_size=32,
    n_group=8,
    topk_group=4,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
OLD = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without transformers' default sizes, except those of the routing."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_pretrained(small(moe=MOE), folder)
    return folder


def changed(saved: Path, folder: Path, changes: dict[str, Any], without: tuple[str, ...] = ()) -> Path:
    """Returns a copy of a checkpoint with changed keys in its config.json."""
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    content = json.loads((saved / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: content[key] for key in content if key not in without}))
    return folder


def logits(model: Transformer) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS)
    return result


def theirs(folder: Path) -> Tensor:
    model: Any = DeepseekV3ForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        result: Tensor = model(TOKENS).logits
    return result


def agree(folder: Path) -> bool:
    """Returns whether a checkpoint is read; asserts transformers' logits, or an error of one line with the folder."""
    try:
        model = load_pretrained(folder)
    except UserError as error:
        assert str(folder) in str(error)
        assert "\n" not in str(error)
        return False
    expected = theirs(folder)
    assert expected.std() > 0.3, "logits of low variance would agree by chance"
    assert (logits(model) - expected).abs().max() <= 2e-5
    return True


def test_defaults_are_those_of_transformers() -> None:
    config = DeepseekV3Config()
    for name, value in {**DEFAULTS, **DEFAULT_TOKENS}.items():
        assert getattr(config, name) == value, name
    own = {field.name for field in dataclasses.fields(DeepseekV3Config)}
    own -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
    # Keys without an effect on logits, and MTP's modules, which are not loaded.
    harmless = {"output_router_logits", "use_cache", "pretraining_tp", "num_mtp_layers"}
    assert own - harmless - {"rope_parameters"} == own & (DEFAULTS.keys() | DEFAULT_TOKENS.keys() | FIXED.keys())
    for name in own & FIXED.keys():
        assert getattr(config, name) == FIXED[name], name


@pytest.mark.parametrize(
    "name", ["routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob", "num_experts_per_tok"]
)
def test_routing_that_is_not_given_is_transformers_own(saved: Path, tmp_path: Path, name: str) -> None:
    assert agree(changed(saved, tmp_path, {}, (name,)))


@pytest.mark.full
def test_every_key_may_be_absent_alone(saved: Path, tmp_path: Path) -> None:
    """Without most sizes the tensors do not fit, which is reported; no absent key changes the model silently."""
    content = json.loads((saved / "config.json").read_text())
    read = {name for name in content if agree(changed(saved, tmp_path, {}, (name,)))}
    assert {*FIXED, "rms_norm_eps", "rope_theta", "rope_parameters", "dtype", "n_shared_experts"} <= read
    assert not read & {"architectures", "num_key_value_heads", "q_lora_rank", "first_k_dense_replace", "vocab_size"}


@pytest.mark.parametrize(
    ("changes", "readable"),
    [
        ({"rope_parameters": YARN}, True),
        ({"rope_parameters": YARN | {"mscale": 1.0}}, True),
        ({"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0}}, True),
        ({"rope_parameters": YARN | {"mscale": None, "mscale_all_dim": None, "beta_fast": None}}, True),
        ({"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.5}}, True),
        ({"rope_parameters": YARN | {"beta_fast": 1, "beta_slow": 1}}, True),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 4, "factor": 64.0}}, True),
        ({"rope_scaling": OLD, "rope_theta": 500.0}, True),
        ({"rope_scaling": OLD, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, True),
        ({"rope_scaling": {}, "rope_parameters": YARN | {"rope_theta": 500.0}}, True),
        ({"rope_parameters": None, "rope_theta": 500.0}, True),
        ({"rope_parameters": YARN | {"mscale_all_dim": 1.0}}, False),
        ({"rope_parameters": YARN | {"mscale": 0.707}}, False),
        ({"rope_parameters": YARN | {"mscale": 0}}, False),
        ({"rope_parameters": YARN | {"truncate": None}}, False),
        ({"rope_parameters": YARN | {"beta_fast": 0}}, False),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, False),
        ({"rope_parameters": {"rope_type": None}}, False),
        ({"rms_norm_eps": 1e-2}, True),
        ({"first_k_dense_replace": 0}, False),
        ({"n_routed_experts": None}, False),
        ({"n_group": None}, False),
        ({"norm_topk_prob": None}, False),
        ({"rope_interleave": None}, False),
    ],
    ids=str,
)
def test_what_is_read_is_read_as_transformers_does(
    saved: Path, tmp_path: Path, changes: dict[str, Any], readable: bool
) -> None:
    folder = changed(saved, tmp_path / "changed", changes)
    assert agree(folder) is readable
    if readable:
        # A saved copy must be the same model, too.
        save_pretrained(load_pretrained(folder), tmp_path / "again")
        assert torch.equal(theirs(tmp_path / "again"), theirs(folder))


VALUE = st.sampled_from([None, 0, 1, 2, 0.5, 1.0, -1, 1e9, "yarn", "default", True, False, [], {}, [1], {"factor": 2}])
ROPE = st.dictionaries(
    st.sampled_from([*YARN, *OLD, "mscale", "mscale_all_dim", "beta_fast", "beta_slow", "rope_theta", "truncate"]),
    VALUE,
)


@given(
    changes=st.dictionaries(st.sampled_from([*DEFAULTS, *FIXED, *DEFAULT_TOKENS, "head_dim", "dtype"]), VALUE)
    | st.fixed_dictionaries({"rope_parameters": ROPE | VALUE}, optional={"rope_scaling": ROPE | VALUE})
)
def test_any_config_is_read_or_refused_in_one_line(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    folder = changed(saved, tmp_path_factory.mktemp("config"), changes)
    try:
        load_pretrained(folder)
    except UserError as error:
        assert str(folder) in str(error)
        assert "\n" not in str(error)
