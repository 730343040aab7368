"""Float16: activations close to its maximum are reported, and rescaling does not change the function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import MOE, YARN, small

from ictx.cli import main
from ictx.errors import UserError
from ictx.model import Transformer
from ictx.model.float16 import measure, require_float16, rescale, too_large, tracked_amax
from ictx.model.hf import load_pretrained, save_pretrained

TOKENS = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(4))


def layer(model: Transformer) -> torch.nn.Module:
    return model.model.layers[1]


@torch.no_grad()
def large_norm(model: Transformer) -> None:
    """Scales the gain of a norm up and the projections after it down."""
    layer(model).input_layernorm.weight.mul_(2.0**15)
    layer(model).self_attn.kv_a_proj_with_mqa.weight.mul_(2.0**-15)
    layer(model).self_attn.q_a_proj.weight.mul_(2.0**-15)


@torch.no_grad()
def large_product(model: Transformer) -> None:
    layer(model).mlp.up_proj.weight.mul_(2.0**18)
    layer(model).mlp.down_proj.weight.mul_(2.0**-18)


@torch.no_grad()
def large_residual(model: Transformer) -> None:
    model.model.embed_tokens.weight.mul_(2.0**19)


@torch.no_grad()
def large_values(model: Transformer) -> None:
    attention, config = layer(model).self_attn, model.config
    rows = attention.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
    rows[:, config.qk_nope_head_dim :].mul_(2.0**17)
    attention.o_proj.weight.mul_(2.0**-17)


@torch.no_grad()
def large_queries(model: Transformer) -> None:
    attention, config = layer(model).self_attn, model.config
    attention.q_b_proj.weight.mul_(2.0**16)
    rows = attention.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
    rows[:, : config.qk_nope_head_dim].mul_(2.0**-16)
    attention.kv_a_proj_with_mqa.weight[config.kv_lora_rank :].mul_(2.0**-16)


@torch.no_grad()
def large_rotary_key(model: Transformer) -> None:
    attention, config = layer(model).self_attn, model.config
    attention.kv_a_proj_with_mqa.weight[config.kv_lora_rank :].mul_(2.0**17)
    rows = attention.q_b_proj.weight.view(config.num_attention_heads, config.qk_head_dim, -1)
    rows[:, config.qk_nope_head_dim :].mul_(2.0**-17)


@torch.no_grad()
def large_latent(model: Transformer) -> None:
    layer(model).self_attn.kv_a_layernorm.weight.mul_(2.0**16)
    layer(model).self_attn.kv_b_proj.weight.mul_(2.0**-16)


CASES = {
    large_norm: "model.layers.1.input_layernorm",
    large_product: "model.layers.1.mlp",
    large_residual: "model.",
    large_values: "model.layers.1.self_attn",
    large_queries: "model.layers.1.self_attn.q_b_proj",
    large_rotary_key: "model.layers.1.self_attn.kv_a_proj_with_mqa",
    large_latent: "model.layers.1.self_attn.kv_a_layernorm",
}


@pytest.mark.parametrize(("damage", "place"), CASES.items(), ids=lambda value: getattr(value, "__name__", None))
def test_what_is_too_large_is_named_and_rescaling_keeps_the_function(
    damage: Callable[[Transformer], None], place: str
) -> None:
    model = small(yarn=YARN)
    assert not too_large(measure(model, [TOKENS]))
    damage(model)
    with torch.no_grad():
        before = model(TOKENS)
    amax = measure(model, [TOKENS])
    with pytest.raises(UserError, match=rf"^{place}\S* \S+ ?reaches|^{place}\S* reaches"):
        require_float16(amax, "hint")
    assert rescale(model, amax)
    after = measure(model, [TOKENS])
    require_float16(after, "hint")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), before, rtol=1e-4, atol=1e-4)
        half = model.half()(TOKENS).float()
    assert half.isfinite().all()
    assert (half - before).abs().max() < 0.1


def test_experts_are_rescaled_too() -> None:
    model = small(moe=MOE)
    experts = layer(model).mlp.experts
    with torch.no_grad():
        experts.gate_up_proj[:, MOE.moe_intermediate_size :].mul_(2.0**18)
        experts.down_proj.mul_(2.0**-18)
        before = model(TOKENS)
    amax = measure(model, [TOKENS])
    with pytest.raises(UserError, match=r"model.layers.1.mlp.experts.product \w+ reaches"):
        require_float16(amax, "hint")
    rescale(model, amax)
    require_float16(measure(model, [TOKENS]), "hint")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), before, rtol=1e-4, atol=1e-4)


def test_tracking_ends_with_its_block_and_sees_what_is_no_number() -> None:
    model = small()
    with torch.no_grad():
        layer(model).mlp.down_proj.weight[0, 0] = torch.nan
        with tracked_amax(model) as amax:
            model(TOKENS)
        size = len(amax)
        model(TOKENS)
    assert len(amax) == size
    assert amax["model.layers.1.mlp.down_proj output"] == float("inf")
    with pytest.raises(UserError, match="reaches inf"):
        require_float16(amax, "hint")


def test_export_refuses_names_the_layer_and_rescales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small()
    large_product(model)
    save_pretrained(model, tmp_path / "model")
    command = ["ictx", "export", "--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "half")]
    monkeypatch.setattr(sys, "argv", [*command, "--dtype", "float16"])
    assert main() == 2
    printed = capsys.readouterr().err
    assert "ictx: model.layers.1.mlp." in printed
    assert "within 4× of float16's largest number, 65,504" in printed
    assert "export with --rescale, or as bfloat16" in printed
    assert not (tmp_path / "half").exists()
    monkeypatch.setattr(sys, "argv", [*command, "--dtype", "float16", "--rescale"])
    assert main() == 0
    assert "scaled by 1/" in capsys.readouterr().out
    half = load_pretrained(tmp_path / "half")
    assert half.lm_head.weight.dtype == torch.float16
    with torch.no_grad():
        assert (half(TOKENS).float() - model(TOKENS)).abs().max() < 0.1
        model.lm_head.weight.mul_(2.0**14)
    save_pretrained(model, tmp_path / "model")
    assert main() == 2
    assert "lm_head output reaches" in (printed := capsys.readouterr().err)
    assert "no scale of the weights changes that" in printed
