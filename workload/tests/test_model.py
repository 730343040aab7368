"""The model agrees with transformers' DeepSeek-V3, and between its modes; invalid sizes are rejected by name."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MOE, SMALL, YARN, reference_of, small
from torch import Tensor
from torch.nn.functional import cross_entropy

from ictx.errors import UserError
from ictx.infer import attention_cached
from ictx.infer.cache import LatentCache
from ictx.model import ModelConfig, Transformer
from ictx.model import moe as moe_module
from ictx.model.attention import LONGEST_DENSE_MASK, Mode
from ictx.model.moe import FeedForward
from ictx.settings import build

CONFIGS = Path(__file__).parents[1] / "configs" / "model"
VARIANTS = list(itertools.product((1, 2, 4, 16), (24, None), (None, YARN), (None, MOE)))


def tokens_of(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert theirs.std() > 0.3, "logits of low variance would agree by chance"
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize(("heads", "q_lora_rank", "yarn", "moe"), VARIANTS)
def test_logits_equal_those_of_transformers(heads: int, q_lora_rank: int | None, yarn: Any, moe: Any) -> None:
    model = small(num_attention_heads=heads, q_lora_rank=q_lora_rank, yarn=yarn, moe=moe)
    tokens = tokens_of(2, 160)
    with torch.no_grad():
        assert difference(model(tokens), reference_of(model)(tokens).logits) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_a_padded_batch_equals_transformers_and_each_row_alone(moe: Any, side: str) -> None:
    model = small(moe=moe, yarn=YARN)
    tokens, lengths = tokens_of(3, 40), (40, 23, 1)
    places = [slice(40 - length, 40) if side == "left" else slice(0, length) for length in lengths]
    mask = torch.zeros_like(tokens)
    for row, place in enumerate(places):
        mask[row, place] = 1
    with torch.no_grad():
        ours = model(tokens, attention_mask=mask)
        theirs = reference_of(model)(tokens, attention_mask=mask).logits
        cached = model(tokens, attention_mask=mask, cache=LatentCache(model.config, 3, 64, block_size=16))
        for row, place in enumerate(places):
            alone = model(tokens[row : row + 1, place])[0]
            for other in (ours, theirs, cached):
                assert (other[row, place] - alone).abs().max() <= 1e-5
    assert ours.isfinite().all()


@pytest.mark.parametrize(("q_lora_rank", "yarn"), list(itertools.product((24, None), (None, YARN))))
def test_gradients_equal_those_of_transformers(q_lora_rank: int | None, yarn: Any) -> None:
    model = small(q_lora_rank=q_lora_rank, yarn=yarn)
    reference = reference_of(model)
    tokens = tokens_of(2, 65)
    for network, logits in ((model, model(tokens)), (reference, reference(tokens).logits)):
        cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        assert network.lm_head.weight.grad is not None
    theirs = dict(reference.named_parameters())
    for name, weight in model.named_parameters():
        expected = theirs[name].grad
        assert weight.grad is not None
        assert (weight.grad - expected).norm() <= 1e-4 * expected.norm(), name


def in_chunks(model: Transformer, tokens: Tensor, cache: LatentCache, chunk: int, mode: Mode) -> Tensor:
    parts = tokens.split(chunk, 1)
    return torch.cat([model(part, cache=cache, mode=mode) for part in parts], 1)


@pytest.mark.parametrize(
    ("mode", "block_size", "moe"),
    [*itertools.product(["absorbed"], [None, 16, 64], [None, MOE]), ("expanded", 16, None), ("auto", None, MOE)],
)
def test_cached_chunks_equal_the_whole_sequence(moe: Any, block_size: int | None, mode: Mode) -> None:
    model, tokens = small(moe=moe, yarn=YARN), tokens_of(2, 80)
    with torch.no_grad():
        whole = model(tokens)
        for chunk in (1, 7, 64):
            cache = LatentCache(model.config, 2, 80, block_size=block_size)
            assert difference(in_chunks(model, tokens, cache, chunk, mode), whole) <= 1e-5, chunk
            assert cache.lengths.tolist() == [80, 80]


@pytest.mark.parametrize("mode", ["absorbed", "expanded"])
def test_the_workspace_is_bounded_and_its_size_changes_nothing(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = small(yarn=YARN), tokens_of(2, 200)
    with torch.no_grad():
        whole = model(tokens)
        for keys, block_size in ((1, None), (50, None), (32, 16)):
            monkeypatch.setattr(attention_cached, "KEYS_AT_ONCE", keys)
            cache = LatentCache(model.config, 2, 256, block_size=block_size)
            assert difference(in_chunks(model, tokens, cache, 90, mode), whole) <= 1e-5


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_any_chunks_any_padding(data: st.DataObject) -> None:
    """Rows of any length, in chunks of any size with padding at any place, have the same logits as each row alone."""
    draw = data.draw
    model = small(
        num_attention_heads=draw(st.integers(1, 3)),
        kv_lora_rank=draw(st.sampled_from([8, 32])),
        qk_rope_head_dim=draw(st.sampled_from([2, 8])),
        qk_nope_head_dim=draw(st.sampled_from([4, 16])),
        v_head_dim=draw(st.sampled_from([4, 24])),
        yarn=draw(st.sampled_from([None, YARN])),
    )
    batch, block_size = draw(st.integers(1, 3)), draw(st.sampled_from([None, 1, 3, 16]))
    cache = LatentCache(model.config, batch, 60, block_size=block_size)
    pieces = [draw(st.integers(1, 12)) for _ in range(draw(st.integers(1, 5)))]
    rows: list[list[int]] = [[] for _ in range(batch)]
    logits: list[list[Tensor]] = [[] for _ in range(batch)]
    with torch.no_grad():
        for number, length in enumerate(pieces):
            tokens = tokens_of(batch, length, number)
            mask = torch.tensor([[draw(st.integers(0, 1)) for _ in range(length)] for _ in range(batch)])
            mode = draw(st.sampled_from(["absorbed", "expanded", "auto"]))
            out = model(tokens, cache=cache, attention_mask=mask, mode=mode)
            for row in range(batch):
                rows[row] += tokens[row][mask[row] == 1].tolist()
                logits[row] += out[row][mask[row] == 1].unbind()
        for row in range(batch):
            if rows[row]:
                alone = model(torch.tensor([rows[row]]))[0]
                assert (torch.stack(logits[row]) - alone).abs().max() <= 1e-5
    assert cache.lengths.tolist() == [len(row) for row in rows]


def test_tokens_that_go_through_the_feed_forward_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = FeedForward(16, 24).double()
    x_bsd = torch.randn(2, 35, 16, dtype=torch.double, requires_grad=True)

    def results() -> list[Tensor]:
        y_bsd = layer(x_bsd)
        return [y_bsd.detach(), *torch.autograd.grad(y_bsd.square().sum(), [x_bsd, *layer.parameters()])]

    whole = results()
    monkeypatch.setattr(moe_module, "AT_ONCE", 9 * 24)
    torch.testing.assert_close(results(), whole)
    with torch.no_grad():
        torch.testing.assert_close(layer(x_bsd), whole[0])


@pytest.mark.parametrize("length", [96, LONGEST_DENSE_MASK + 30], ids=["mask", "one by one"])
def test_documents_in_one_sequence_do_not_see_each_other(length: int) -> None:
    model = small(num_hidden_layers=1, max_position_embeddings=4096)
    tokens, cuts = tokens_of(2, length), ([0, 17, 60, length], [0, length])
    documents = torch.zeros_like(tokens)
    positions = torch.zeros_like(tokens)
    for row, bounds in enumerate(cuts):
        for number, (first, end) in enumerate(itertools.pairwise(bounds)):
            documents[row, first:end] = number
            positions[row, first:end] = torch.arange(end - first)
    with torch.no_grad():
        packed = model(tokens, positions, document_ids=documents)
        for row, bounds in enumerate(cuts):
            for first, end in itertools.pairwise(bounds):
                alone = model(tokens[row : row + 1, first:end])
                assert (packed[row, first:end] - alone[0]).abs().max() <= 1e-5
        backwards = model(tokens, positions, document_ids=10 - documents)
        assert torch.equal(packed, backwards), "document IDs can be in any order"
        assert (model(tokens, positions)[0, 60:] - packed[0, 60:]).abs().max() > 0.01, "without IDs documents attend"


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, tokens = small(), tokens_of(1, 20)
    changed = tokens.clone()
    changed[0, 10:] = 96 - changed[0, 10:]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :10], model(changed)[:, :10])
        assert not torch.allclose(model(tokens)[:, 10:], model(changed)[:, 10:])


def test_blocks_come_back_and_a_full_cache_stays_as_it_was() -> None:
    model, tokens = small(), tokens_of(2, 40)
    cache = LatentCache(model.config, 2, 64, block_size=8, blocks=10)
    with torch.no_grad():
        model(tokens, cache=cache)
        with pytest.raises(UserError, match="0 free blocks of 8 tokens: too few"):
            model(tokens[:, :1], cache=cache)
        with pytest.raises(UserError, match="a sequence of 80 tokens does not fit the cache: its limit is 64"):
            model(tokens, cache=cache)
        cache.release(0)
        mask = torch.ones_like(tokens)
        mask[1] = 0
        again = model(tokens.flip(1), cache=cache, attention_mask=mask)
        assert difference(again[0], model(tokens.flip(1))[0]) <= 1e-5
    assert cache.lengths.tolist() == [40, 40]


def test_the_cache_takes_what_its_dtype_says() -> None:
    config = ModelConfig.from_yaml(CONFIGS / "ictx-1b.yaml")
    tiny = ModelConfig.from_yaml(CONFIGS / "tiny.yaml")
    cache = LatentCache(tiny, 1, 64, block_size=16, dtype=torch.bfloat16)
    assert cache.bytes_per_token == 576 * 2 * 2
    assert cache.bytes_allocated == 64 * cache.bytes_per_token
    assert cache.layers[0].shape == (4, 16, 576)
    assert cache.block_tables.dtype == torch.int32
    assert config.cache_width * 2 * config.num_hidden_layers == 18_432


def test_a_half_precision_cache_is_close() -> None:
    model, tokens = small(), tokens_of(1, 64)
    with torch.no_grad():
        cache = LatentCache(model.config, 1, 64, dtype=torch.bfloat16)
        off = difference(in_chunks(model, tokens, cache, 5, "auto"), model(tokens))
    assert 1e-4 < off < 0.1


def test_a_seed_gives_the_same_weights_by_way_of_the_meta_device() -> None:
    model = small(moe=MOE)
    with torch.device("meta"):
        other = Transformer(model.config)
    other.to_empty(device="cpu")
    other.init_weights(seed=7)
    for (name, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        if "correction_bias" not in name:  # the tests' models set it
            assert torch.equal(ours, theirs), name
    before = other.lm_head.weight.clone()
    other.init_weights(seed=8)
    assert not torch.equal(before, other.lm_head.weight)


@pytest.mark.parametrize(("name", "parameters"), [("ictx-1b", 1_004_623_872), ("ictx-1b-128k", 1_004_623_872)])
def test_the_large_model_has_the_size_it_is_named_after(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_yaml(CONFIGS / f"{name}.yaml"))
    assert sum(weight.numel() for weight in model.parameters()) == parameters


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_keeps_the_widths_that_servers_need(path: Path) -> None:
    config = ModelConfig.from_yaml(path)
    widths = (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim)
    assert widths == (512, 64, 128, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 0}, r"num_attention_heads is 0: expected more than 0"),
        ({"qk_rope_head_dim": 63}, r"qk_rope_head_dim is 63: expected an even number"),
        ({"q_lora_rank": 0}, r"q_lora_rank is 0: expected more than 0, or none"),
        ({"rope_theta": float("nan")}, r"rope_theta is nan: expected more than 0"),
        ({"rope_theta": 1}, r"rope_theta is 1.0: expected more than 1"),
        ({"num_nextn_predict_layers": 2}, r"num_nextn_predict_layers is 2: expected 0 or 1"),
        ({"hiden_size": 48}, r"unknown setting hiden_size: did you mean hidden_size\?"),
        ({"hidden_size": "wide"}, r"hidden_size is 'wide': expected int"),
        ({"hidden_size": True}, r"hidden_size is True: expected int"),
        (
            {"max_position_embeddings": 100, "yarn": dataclasses.asdict(YARN)},
            r"max_position_embeddings is 100: expected .* = 256",
        ),
        ({"yarn": {"factor": 2}}, r"missing setting yarn.original_max_position_embeddings"),
        ({"yarn": dataclasses.asdict(YARN) | {"factor": 0.5}}, r"yarn.factor is 0.5: expected 1 or more"),
        ({"yarn": dataclasses.asdict(YARN) | {"beta_slow": 33}}, r"yarn.beta_fast is 32.0: expected at least beta_sl"),
        ({"yarn": dataclasses.asdict(YARN) | {"mscale": 0}}, r"yarn.mscale is 0.0: expected more than 0"),
        (
            {"moe": dataclasses.asdict(MOE) | {"n_group": 3}},
            r"moe.n_group is 3: expected to divide n_routed_experts, 8",
        ),
        ({"moe": dataclasses.asdict(MOE) | {"topk_group": 5}}, r"moe.topk_group is 5: expected at most n_group, 4"),
        (
            {"moe": dataclasses.asdict(MOE) | {"num_experts_per_tok": 5}},
            r"moe.num_experts_per_tok is 5: expected at most 4, the experts of topk_group groups",
        ),
        (
            {"moe": dataclasses.asdict(MOE) | {"first_k_dense_replace": 9}},
            r"moe.first_k_dense_replace is 9: expected at most num_hidden_layers, 3",
        ),
    ],
)
def test_wrong_sizes_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(ModelConfig, {**SMALL, **change})


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("vocab_size: 0\n")
    with pytest.raises(UserError, match=r"broken.yaml: missing setting hidden_size"):
        ModelConfig.from_yaml(path)
