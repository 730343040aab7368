"""Supervised fine-tuning: loss of answers only, separate conversations, packed or not; adapters."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Commands, conversation
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_pretrain import curve, records, result_of, wait_for_step
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from ictx.data.chat.files import read_rows
from ictx.data.chat.packing import ChatBatches, Windows, best_fit
from ictx.data.chat.template import Template
from ictx.data.chat.tokens import Conversations, encoded, numbers
from ictx.data.tokenizer import CHAT_TEMPLATE, read_tokenizer
from ictx.errors import UserError
from ictx.model import Transformer
from ictx.model.config import MoeConfig
from ictx.model.hf import load_pretrained, save_pretrained
from ictx.model.hf_config import read_hf_config
from ictx.train.checkpoint import load_model
from ictx.train.child import main
from ictx.train.config import read
from ictx.train.sft import Tuning


def arguments(commands: Commands, parent: Path, chats: Path, run: Path, *settings: str) -> list[object]:
    wanted = [f"init=run:{parent}", f"run.dir={run}", f"data.dir={chats}", *settings]
    return ["train", "sft", "--config", commands.folder / "sft.yaml", *(f"--set={value}" for value in wanted)]


def test_tokens_and_answers_are_those_of_transformers(parent: Path) -> None:
    rows = [conversation(number) for number in range(8)]
    special = [{"role": "system", "content": "ü" * 50}, *rows[0]["messages"]]
    rows.append({"messages": special})
    theirs = AutoTokenizer.from_pretrained(parent / "export")
    ours = encoded(rows, read_tokenizer(parent / "export"), Template(CHAT_TEMPLATE, {}))
    for row, tokens in zip(rows, ours, strict=True):
        wanted = theirs.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        assert numbers(tokens).tolist() == wanted["input_ids"]
        assert (tokens >= 0).astype(int).tolist() == wanted["assistant_masks"]
        assert 0 < sum(wanted["assistant_masks"]) < len(tokens)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=60), capacity=st.integers(50, 90))
def test_best_fit_puts_everything_somewhere_and_nothing_twice(sizes: list[int], capacity: int) -> None:
    sizes = sorted(sizes, reverse=True)
    bins, room = best_fit(sizes, capacity), dict[int, int]()
    for size, chosen in zip(sizes, bins, strict=True):
        fitting = [left for left in room.values() if left >= size]
        assert room.get(chosen, capacity) == min(fitting, default=capacity), "the fullest window with enough room"
        room[chosen] = room.get(chosen, capacity) - size
    assert min(room.values()) >= 0 and sorted(room) == list(range(len(room)))


def array(sizes: list[int]) -> Conversations:
    """Returns distinguishable conversations: all tokens of number n are n + 1, the second half is the answer."""
    tokens = [np.where(np.arange(size) < size // 2, -2 - number, number + 1) for number, size in enumerate(sizes)]
    return Conversations(np.concatenate(tokens), np.cumsum(sizes))


@given(sizes=st.lists(st.integers(1, 20), min_size=4, max_size=30), seed=st.integers(0, 99), packed=st.booleans())
def test_each_epoch_has_every_conversation_whole_and_once(sizes: list[int], seed: int, packed: bool) -> None:
    windows = Windows(array(sizes), 20, seed, packed)
    for epoch in range(3):
        seen = []
        for number in range(epoch * len(windows), (epoch + 1) * len(windows)):
            batch = windows.batch([number])
            (ids,), (labels,), (places,), (documents,) = (
                x.tolist() for x in (batch.input_ids, batch.labels, batch.position_ids, batch.document_ids)
            )
            assert len(ids) <= 20
            start = 0
            for document in range(documents[-1] + 1):
                length = documents.count(document)
                here = slice(start, start + length)
                assert places[here] == list(range(length)) and set(documents[here]) == {document}
                (token,) = set(ids[here])
                if token:
                    assert length == sizes[token - 1]
                    wanted = [token if place >= length // 2 else -1 for place in range(1, length)] + [-1]
                    assert [max(label, -1) for label in labels[here]] == wanted
                    seen.append(token - 1)
                else:
                    assert set(labels[here]) == {-1}
                start += length
        assert sorted(seen) == list(range(len(sizes)))


@given(stops=st.lists(st.integers(0, 4), max_size=3), ranks=st.sampled_from([1, 2, 4]))
def test_windows_go_on_after_a_stop_on_more_or_fewer_ranks(stops: list[int], ranks: int) -> None:
    windows = Windows(array([7, 9, 3, 20, 11, 5, 8, 8, 16, 2] * 4), 20, 3)
    single, taken = ChatBatches(windows, 1, 0, 1), 0
    for stop in [*stops, 2]:
        each = [ChatBatches(windows, 1, rank, ranks) for rank in range(ranks)]
        for source in each:
            source.load_state_dict(source.state_dict() | {"taken": taken})
        for _ in range(stop):
            for source in each:
                assert torch.equal(source.next().input_ids, single.next().input_ids)
        taken = each[0].state_dict()["taken"]
    for name, other in {"seed": 9, "length": 21, "packed": 0}.items():
        with pytest.raises(UserError, match="but the checkpoint's data has the order of"):
            single.load_state_dict(single.state_dict() | {name: other})


def test_packed_equals_unpacked(tune: Callable[..., Path], parent: Path, chats: Path) -> None:
    """In one step on all conversations, loss and gradient do not depend on the packing."""
    rows = list(read_rows(chats, "train"))
    tokens = list(encoded(rows, read_tokenizer(parent / "export"), Template(CHAT_TEMPLATE, {})))
    data, found = Conversations(np.concatenate(tokens), np.cumsum([len(each) for each in tokens])), {}
    for packed in (True, False):
        windows = len(Windows(data, 192, 0, packed))
        assert windows < len(rows) / 2 if packed else windows == len(rows)
        wanted = ["train.steps=1", "train.batch_size=1", f"train.accumulate={windows}", "train.validation_windows=1000"]
        (record,) = records(tune(str(packed), *wanted, f"packing={packed}"))
        found[packed] = record["loss"], record["gradient_norm"], record["validation_loss"]
    assert found[True] == pytest.approx(found[False], rel=2e-5)


def test_the_loss_is_that_of_held_out_answers_alone(tune: Callable[..., Path], parent: Path, chats: Path) -> None:
    """Equals transformers' loss with the exported model, one conversation at a time; before, with the parent."""
    run = tune("run", "train.validation_windows=1000")
    result, tokenizer = result_of(run), AutoTokenizer.from_pretrained(run / "export")
    for folder, name in ((run, "val_loss"), (parent, "val_loss_before")):
        model = AutoModelForCausalLM.from_pretrained(folder / "export")
        total = count = 0.0
        for row in read_rows(chats, "validation"):
            one = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
            with torch.no_grad():
                logits = model(torch.tensor([one["input_ids"]])).logits[0, :-1]
            masked = zip(one["input_ids"], one["assistant_masks"], strict=True)
            labels = torch.tensor([i if m else -100 for i, m in masked])
            total += cross_entropy(logits, labels[1:], reduction="sum").item()
            count += sum(one["assistant_masks"])
        assert result[name] == pytest.approx(total / count, rel=1e-5), name
    assert result["val_loss"] < result["val_loss_before"] - 0.5, "the loss decreases"


@pytest.mark.full
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    commands: Commands, parent: Path, chats: Path, tmp_path: Path
) -> None:
    """With dropout in the adapter, which needs random numbers."""
    same = ["train.steps=40", "train.checkpoint_every=1000", "train.lora={rank: 4, dropout: 0.2}"]
    words = arguments(commands, parent, chats, tmp_path / "stopped", *same)
    ranks = commands.ranks(2, *words)
    wait_for_step(tmp_path / "stopped", 5, ranks)
    ranks[1].send_signal(signal.SIGTERM)
    ended = [commands.end(rank) for rank in ranks]
    assert [rank.status for rank in ended] == [75, 75], ended
    ended = [commands.end(rank) for rank in commands.ranks(2, *words)]
    assert [rank.status for rank in ended] == [0, 0], ended
    assert "resuming after step" in ended[0].out
    whole = commands.ranks(2, *arguments(commands, parent, chats, tmp_path / "whole", *same))
    assert [commands.end(rank).status for rank in whole] == [0, 0]
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")


def test_an_adapter_is_exported_merged_and_as_peft_reads_it(tune: Callable[..., Path], parent: Path) -> None:
    from peft import PeftModel

    run = tune("run", "train.lora={rank: 4, alpha: 8}", "optimizer.learning_rate=0.02")
    assert result_of(run)["val_loss"] < records(run)[0]["loss"] - 0.3, "the loss decreases"
    base = AutoModelForCausalLM.from_pretrained(run / "init", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        before = base(tokens).logits
        theirs = PeftModel.from_pretrained(base, run / "adapter")
        logits = theirs(tokens).logits
        torch.testing.assert_close(logits, merged(tokens).logits, rtol=1e-4, atol=1e-4)
        assert (logits - before).abs().max() > 0.1
        torch.testing.assert_close(load_pretrained(run / "export")(tokens), logits, rtol=1e-4, atol=1e-4)
    kept, first = load_pretrained(run / "export").state_dict(), load_pretrained(parent / "export").state_dict()
    names = {
        name.rpartition(".lora_")[0].removeprefix("base_model.model.")
        for name in load_file(run / "adapter" / "adapter_model.safetensors")
    }
    for name, weight in kept.items():
        assert torch.equal(weight, first[name]) == (name.removesuffix(".weight") not in names), name
    assert len(names) == 2 * 8, "q_a, q_b, kv_a, kv_b, o, gate, up and down of two layers"
    with pytest.raises(UserError, match="has an adapter"):
        load_model(next((run / "checkpoints").iterdir()))


def test_an_adapter_leaves_routed_experts_and_routers_as_they_are(
    tune: Callable[..., Path], parent: Path, tmp_path: Path
) -> None:
    """Attention, dense layers and shared experts have one; PEFT gives the results of the merged export."""
    from peft import PeftModel

    experts = MoeConfig(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1)
    config = replace(read_hf_config(parent / "export")[0], moe=experts, num_hidden_layers=2)
    model = Transformer(config)
    model.init_weights(5)
    save_pretrained(model, tmp_path / "experts" / "export", parent / "export")
    (tmp_path / "experts" / "result.json").write_text("{}")
    lora = ["train.lora={rank: 4, alpha: 8}", "optimizer.learning_rate=0.02", "train.steps=4"]
    run = tune("run", f"init=run:{tmp_path}/experts", *lora)
    kept, first = (load_pretrained(run / folder).state_dict() for folder in ("export", "init"))
    changed = {name for name, weight in kept.items() if not torch.equal(weight, first[name])}
    assert not [name for name in changed if ".mlp.experts." in name or ".mlp.gate." in name]
    assert {name for name in changed if ".shared_experts." in name}, "shared experts are trained"
    base, merged = (
        AutoModelForCausalLM.from_pretrained(run / name, dtype=torch.float32) for name in ("init", "export")
    )
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        wanted = merged(tokens).logits
        torch.testing.assert_close(
            PeftModel.from_pretrained(base, run / "adapter")(tokens).logits, wanted, rtol=1e-4, atol=1e-4
        )
    with pytest.raises(UserError, match=r"train.lora.targets has gate_up_proj: expected some of down_proj, gate_proj"):
        tune("other", f"init=run:{tmp_path}/experts", "train.lora={targets: [gate_up_proj]}")


def test_long_conversations_are_left_out_and_reported(
    tune: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tune("run", "train.sequence_length=80", "train.steps=1")
    out = capsys.readouterr().out
    assert "train conversations (longer than train.sequence_length, 80): the longest has" in out
    (tokens,) = (run / "conversations").iterdir()
    assert Conversations.open(tokens / "train.bin").sizes.max() <= 80


BARE = CHAT_TEMPLATE.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.sequence_length=8"], r"no train conversation of .* has at most 8 tokens .*: the longest has \d+"),
        (["train.sequence_length=512"], "longer than the parent's context of 256 tokens"),
        (["chat_template=FOLDER/bare.jinja"], "does not mark the answers: put {% generation %}"),
        (["chat_template=FOLDER/none.jinja"], "No such file or directory: .*/none.jinja"),
        (["chat_template=FOLDER/broken.jinja"], "the chat template fails: TemplateSyntaxError"),
        (["data.kind=dpo"], "data.kind is dpo: expected sft"),
        (["data.dir=PREPARED"], "holds pretrain data, not sft"),
        (["data.dir=null"], "data.dir is not set"),
        (["train.lora={targets: [w_proj]}"], "train.lora.targets has w_proj: expected some of down_proj, gate_proj"),
        (["train.lora={rank: 0}"], "train.lora.rank is 0: expected 1 or more"),
        (["train.batch_size=500"], "windows of 192 tokens, but a global batch takes 500: prepare more rows"),
    ],
)
def test_what_does_not_fit_is_one_line(
    commands: Commands,
    parent: Path,
    chats: Path,
    prepared: Path,
    tmp_path: Path,
    settings: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", commands.tracking_uri)
    (tmp_path / "bare.jinja").write_text(BARE)
    (tmp_path / "broken.jinja").write_text("{% if %}")
    wanted = [f"init=run:{parent}", f"run.dir={tmp_path}/run", f"data.dir={chats}"]
    wanted += [each.replace("FOLDER", str(tmp_path)).replace("PREPARED", str(prepared)) for each in settings]
    with pytest.raises((UserError, FileNotFoundError), match=message):
        main(Tuning, read(str(commands.folder / "sft.yaml"), wanted))


def test_a_template_of_one_s_own_is_exported(tune: Callable[..., Path], tmp_path: Path) -> None:
    own = CHAT_TEMPLATE.replace("assistant\\n", "bot\\n")
    (tmp_path / "own.jinja").write_text(own)
    run = tune("run", "train.steps=1", f"chat_template={tmp_path}/own.jinja")
    text = AutoTokenizer.from_pretrained(run / "export").apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>bot\n")
