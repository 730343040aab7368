"""`ictx eval perplexity` and `needle`: results, resumption, and rejected requests."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluated import export, ictx
from models import YARN, small

from ictx.errors import UserError
from ictx.evaluate import needle
from ictx.evaluate.intervals import bootstrap
from ictx.evaluate.perplexity import bytes_of_tokens, edges, measure, sum_up
from ictx.evaluate.samples import Planned, Samples, finish, open_samples
from ictx.infer.likelihood import Prefill, continuation, token_losses
from ictx.infer.vocabulary import Vocabulary
from ictx.model import Transformer
from ictx.model.hf import load_pretrained

TEXT = "The grass is green. Die Straße ist naß – déjà vu! " * 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("evaluated") / "model", yarn=YARN)


def result(out: Path) -> dict[str, object]:
    return dict(json.loads((out / "result.json").read_text()))


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_losses_in_chunks_are_those_of_one_forward(chunk_size: int) -> None:
    model = small(yarn=YARN)
    tokens = torch.randint(97, (2, 80), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(token_losses(model, tokens, Prefill(chunk_size)), expected, atol=2e-5, rtol=1e-5)
    last = token_losses(model, tokens, Prefill(chunk_size), last=9)
    torch.testing.assert_close(last, expected[:, -9:], atol=2e-5, rtol=1e-5)


def test_what_greedy_decoding_makes_is_found_and_nothing_else() -> None:
    from ictx.infer.generate import generate

    model, prompt = small(yarn=YARN), list(range(40))
    made = list(generate(model, prompt, max_new_tokens=5))
    assert continuation(model, prompt, made, Prefill(16))[1]
    assert not continuation(model, prompt, [*made[:-1], (made[-1] + 1) % 97], Prefill(16))[1]


def test_a_text_longer_than_the_context_is_refused_unless_it_is_meant() -> None:
    model, tokens = small(), torch.zeros(1, 300, dtype=torch.int64)
    with pytest.raises(UserError, match="length is 299: the model's max_position_embeddings is 256"):
        token_losses(model, tokens, Prefill())
    assert token_losses(model, tokens, Prefill(beyond=True)).shape == (1, 299)


def test_bytes_of_tokens_are_those_of_the_text(checkpoint: Path) -> None:
    vocabulary = Vocabulary.load(checkpoint)
    sizes = bytes_of_tokens(vocabulary.tokenizer)
    assert sizes[vocabulary.encode(TEXT, chat=False)].sum() == len(TEXT.encode())
    assert sizes[256] == sizes[257] == 0, "special tokens have no text"


def test_buckets_hold_each_position_once(checkpoint: Path) -> None:
    assert edges(100) == [0, 100] and edges(1024) == [0, 256, 512, 1024] and edges(1025)[-2:] == [1024, 1025]
    model, vocabulary = load_pretrained(checkpoint), Vocabulary.load(checkpoint)
    windows = [np.array(vocabulary.encode(TEXT, chat=False)[start : start + 201]) for start in (0, 300)]
    records = list(measure(model, windows, bytes_of_tokens(vocabulary.tokenizer), Prefill()))
    found = sum_up(records, 200)
    losses = token_losses(model, torch.from_numpy(np.stack(windows)), Prefill())
    assert found["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert found["perplexity_low"] <= found["perplexity"] <= found["perplexity_high"]
    read = sum(len(bytes(vocabulary.tokenizer.decode(list(window[1:])), "utf-8")) for window in windows)
    assert found["bits_per_byte"] == pytest.approx(float(losses.sum()) / math.log(2) / read, rel=0.02)


def test_the_command_measures_files_and_goes_on_where_it_was(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    command = ["eval", "perplexity", "--model", checkpoint, "--files", tmp_path / "text", "--length", 100]
    command += ["--samples", 6, "--out", tmp_path / "out"]
    assert ictx(monkeypatch, *command, "--batch-size", 2) == 0
    printed = capsys.readouterr().out
    assert "perplexity: 6 samples; 600 tokens to read and write, batch size 2" in printed
    assert "the first batch took" in printed and (tmp_path / "out/perplexity.png").stat().st_size > 1000
    first, lines = result(tmp_path / "out"), (tmp_path / "out/samples.jsonl").read_bytes()
    # A killed process can leave a partial line.
    kept = lines.splitlines(keepends=True)
    (tmp_path / "out/samples.jsonl").write_bytes(b"".join(kept[:4]) + kept[4][:10])
    assert ictx(monkeypatch, *command) == 0
    assert "6 samples, 4 of them finished before; 200 tokens" in capsys.readouterr().out
    second = result(tmp_path / "out")
    assert second["metrics"] == pytest.approx(first["metrics"], rel=1e-5)
    assert second["measured"] == first["measured"]
    assert ictx(monkeypatch, *command[:-3], 5, *command[-2:]) == 2
    assert "has samples of other settings (samples was 6, is 5): set another --out" in capsys.readouterr().err


def test_prepared_data_is_measured_as_the_files_it_was_made_of(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ictx.model.hf import save_pretrained

    model = Transformer(small(vocab_size=512).config)
    model.init_weights(seed=1)
    save_pretrained(model, tmp_path / "model", prepared)
    command = ["eval", "perplexity", "--model", tmp_path / "model", "--data", prepared, "--length", 64, "--samples", 5]
    assert ictx(monkeypatch, *command, "--out", tmp_path / "a") == 0
    assert ictx(monkeypatch, *command, "--out", tmp_path / "b", "--whole-documents") == 0
    metrics = result(tmp_path / "a")["metrics"]
    # The perplexity of an untrained model is about the size of the vocabulary.
    assert isinstance(metrics, dict) and metrics["perplexity"] == pytest.approx(512, rel=0.7)
    other = export(tmp_path / "other")
    assert ictx(monkeypatch, *command[:2], "--model", other, *command[4:], "--out", tmp_path / "c") == 2
    assert "was prepared with another tokenizer than the model's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["perplexity", "--files", "{text}", "--samples", "0"], "samples is 0: expected 1 or more"),
        (
            ["perplexity", "--files", "{text}", "--length", "257"],
            "length is 257: expected 1 to the model's max_position",
        ),
        (["perplexity", "--files", "/nowhere"], "/nowhere"),
        (["perplexity", "--data", "/nowhere"], "/nowhere holds no prepared data"),
        (["perplexity", "--files", "{text}", "--batch-size", "0"], "batch-size is 0: expected 1 or more"),
        (["perplexity", "--files", "{text}", "--chunk-size", "0"], "chunk-size is 0: expected 1 or more"),
        (["perplexity", "--files", "{text}", "--cache-dtype", "int8"], "cache-dtype int8 keeps keys in the dtype"),
        (["needle", "--samples", "0"], "samples is 0: expected 1 or more"),
        (["needle", "--lengths", "512"], "lengths has 512: expected at most the model's max_position_embeddings, 256"),
        (["needle", "--lengths", "90"], "length is 90: the needle and its question take"),
        (["needle", "--depths", "1.5"], "depth is 1.5: expected 0 (the beginning) to 1 (the end)"),
        (["needle", "--device", "tpu"], "--device is tpu: expected cpu, cuda or cuda:NUMBER"),
        (["needle", "--model", "/nowhere"], "/nowhere is not a model (no config.json)"),
        (["needle", "--model", "models:/x"], "'models:/x' is not a model: expected models:/<name>@<alias>"),
    ],
)
def test_wrong_requests_are_one_line(
    checkpoint: Path, tmp_path: Path, arguments: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "text").write_text(TEXT)
    words = [word.format(text=tmp_path / "text") for word in arguments]
    model = [] if "--model" in words else ["--model", checkpoint]
    assert ictx(monkeypatch, "eval", *words, *model, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_a_needle_is_where_it_is_said_to_be_and_the_prompt_as_long(checkpoint: Path) -> None:
    vocabulary = Vocabulary.load(checkpoint)
    haystack = needle.Haystack.of(TEXT, vocabulary)
    for depth in (0.0, 0.5, 1.0):
        prompt, answer = needle.build(needle.Needle(1000, depth, 0), haystack, vocabulary, seed=0)
        assert len(prompt) + len(answer) == 1000
        text, number = vocabulary.tokenizer.decode(prompt), vocabulary.tokenizer.decode(answer)
        assert text.count(f"{number}.") == 1 and text.endswith(" is")
        sentence = text.index("The magic number of")
        room = 1000 - len(needle.NEEDLE) - len(needle.QUESTION)
        assert abs(sentence / room - depth) < 0.15
        assert depth == 0 or text[: sentence - 1].endswith(".")
    assert needle.build(needle.Needle(1000, 0.5, 0), haystack, vocabulary, seed=1) != (prompt, answer)


def test_the_grid_counts_what_was_found() -> None:
    records = [
        {
            "length": length,
            "depth": depth,
            "found": length == 64 or depth == 1.0,
            "nats_per_token": 1.0,
            "tokens": length,
        }
        for length in (64, 128)
        for depth in (0.0, 1.0)
        for _ in range(4)
    ]
    found = needle.sum_up(records)
    assert found["needle"] == 0.75 and found["needle_low"] < 0.75 < found["needle_high"]
    assert [cell["found"] for cell in found["grid"]] == [1, 1, 0, 1]
    assert [row["found"] for row in found["lengths"]] == [1, 0.5]


def test_the_command_writes_the_grid(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "needle", "--model", checkpoint, "--depths", 0, 1, "--out", tmp_path / "out"]
    assert ictx(monkeypatch, *command, "--lengths", 300, 200, "--beyond") == 0
    assert "4 samples; 1,000 tokens to read and write" in capsys.readouterr().out
    details = result(tmp_path / "out")["details"]
    assert isinstance(details, dict)
    assert [(cell["length"], cell["depth"]) for cell in details["grid"]] == [(200, 0), (200, 1), (300, 0), (300, 1)]
    assert (tmp_path / "out/needle.png").stat().st_size > 1000


def test_no_two_processes_write_the_same_samples(tmp_path: Path) -> None:
    once = open_samples(tmp_path, {}), open_samples(tmp_path, {})
    with once[0], pytest.raises(UserError, match="another evaluation writes"), once[1]:
        pass


def test_a_sample_that_fails_loses_none_before_it(tmp_path: Path) -> None:
    planned = [Planned(str(number), 1, number) for number in range(5)]

    def work(batch: object) -> list[dict[str, int]]:
        (number,) = batch  # type: ignore[misc]
        if number == 3:
            raise UserError("away")
        return [{"number": number}]

    with open_samples(tmp_path, {}) as samples, pytest.raises(UserError, match="away"):
        finish("test", planned, samples, work)
    assert list(Samples(tmp_path / "samples.jsonl").done) == ["0", "1", "2"]
    (tmp_path / "samples.jsonl").write_text('{"key": "0"}\n[]\n')
    with pytest.raises(UserError, match=r"samples.jsonl line 2 is not a finished sample"):
        Samples(tmp_path / "samples.jsonl")


def test_bootstrap_intervals_hold_the_mean_as_often_as_they_should() -> None:
    generator = np.random.default_rng(5)
    inside = 0
    for seed in range(200):
        interval = bootstrap(list(generator.normal(2.0, 1.0, 40)), seed=seed)
        inside += interval.low <= 2.0 <= interval.high
    assert 180 <= inside <= 199
    weighted = bootstrap([1.0, 5.0], [3.0, 1.0])
    assert weighted.mean == 2.0 and (weighted.low, weighted.high) == (1.0, 5.0)
