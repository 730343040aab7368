"""Generation: tokens, sampling, and the commands."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from models import MOE, YARN, reference_of, small
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import PreTrainedTokenizerFast

from ictx.cli import main
from ictx.errors import UserError
from ictx.infer.cache import LatentCache
from ictx.infer.decode_step import DecodeStep, uncaptured
from ictx.infer.generate import Report, _make_ready, generate, refuse_quantised
from ictx.infer.sampling import Sampler, Sampling
from ictx.infer.vocabulary import Vocabulary
from ictx.kernels import dispatch
from ictx.model.describe import describe
from ictx.model.hf import load_pretrained, save_pretrained

END, TURN = "<|endoftext|>", "<|im_end|>"
CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' }}{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model over bytes, with its tokenizer."""
    folder = tmp_path_factory.mktemp("generate")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    vocabulary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token=END)
    wrapped.add_special_tokens({"additional_special_tokens": [TURN]})
    wrapped.chat_template = CHAT
    save_pretrained(small(vocab_size=258, moe=MOE, yarn=YARN), folder / "model", wrapped)
    return folder / "model"


def ictx(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["ictx", *map(str, arguments)])
    return main()


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
def test_greedy_tokens_are_those_of_transformers(moe: object) -> None:
    model = small(moe=moe, yarn=YARN)
    reference = reference_of(model)
    for seed in range(4):
        prompt = torch.randint(97, (1, 20), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            theirs = reference.generate(prompt, max_new_tokens=40, min_new_tokens=40, do_sample=False)[0, 20:].tolist()
        assert list(generate(model, prompt[0].tolist(), max_new_tokens=40)) == theirs


def test_chunks_and_blocks_change_nothing() -> None:
    model, prompt = small(yarn=YARN), list(range(90))
    expected = list(generate(model, prompt, max_new_tokens=20))
    for chunk_size, block_size in ((1, 16), (7, None), (64, 1), (90, 64)):
        tokens = generate(model, prompt, max_new_tokens=20, chunk_size=chunk_size, block_size=block_size)
        assert list(tokens) == expected


def test_a_stop_token_ends_generation_and_is_not_yielded() -> None:
    model = small()
    tokens, report = list(generate(model, [1, 2, 3], max_new_tokens=30)), Report()
    stop = tokens[4]
    stopped = list(generate(model, [1, 2, 3], max_new_tokens=30, stop=frozenset([stop]), report=report))
    assert stopped == tokens[: tokens.index(stop)]
    assert report.new_tokens == len(stopped) + 1
    assert report.cache_bytes == (3 + len(stopped)) * model.config.cache_width * 4 * 3


def draws(sampling: Sampling, logits: Tensor, count: int = 3000) -> Tensor:
    sampler = Sampler(sampling, torch.device("cpu"))
    return torch.bincount(sampler(logits.expand(count, -1)), minlength=logits.shape[-1]) / count


def test_draws_follow_temperature_top_k_and_top_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert draws(Sampling(), logits)[0] == 1
    assert (draws(Sampling(1.0, seed=1), logits) - logits.exp()).abs().max() < 0.04
    hot = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 0.5
    assert (draws(Sampling(2.0, seed=1), logits) - hot / hot.sum()).abs().max() < 0.04
    expected = torch.tensor([0.625, 0.375, 0, 0])
    assert (draws(Sampling(1.0, top_k=2, seed=1), logits) - expected).abs().max() < 0.04
    # 0.5 is less than 0.6, so the token that exceeds it is included.
    assert (draws(Sampling(1.0, top_p=0.6, seed=1), logits) - expected).abs().max() < 0.04
    assert draws(Sampling(1.0, top_p=0.5, seed=1), logits)[0] == 1
    for cold in (1e-40, 1e-300, 5e-324):
        assert draws(Sampling(cold), logits)[0] == 1
    assert draws(Sampling(1e300, seed=1), logits).min() > 0.2
    shuffled = logits[[3, 0, 2, 1]]
    assert set(draws(Sampling(1.0, top_p=0.6, seed=1), shuffled).nonzero().flatten().tolist()) == {1, 3}


@given(temperature=st.floats(0, exclude_min=True, allow_infinity=False), width=st.floats(0, 1e38), seed=st.integers(0))
def test_any_temperature_draws_a_token(temperature: float, width: float, seed: int) -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 1.0]]) * width
    token = int(Sampler(Sampling(temperature, seed=seed % 2**64), torch.device("cpu"))(logits))
    assert 0 <= token < 4 and (width < 1e-3 or width / temperature < 100 or token in (1, 3))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(value: float, temperature: float) -> None:
    with pytest.raises(UserError, match=r"logits are not finite: .* \(float32\)"):
        Sampler(Sampling(temperature), torch.device("cpu"))(torch.tensor([[0.0, value]]))


def test_making_ready_changes_nothing() -> None:
    """On a GPU, warm-up runs the first and last chunks before the measurement, and resets the cache."""
    model, prompt = small(yarn=YARN), torch.tensor([list(range(50))])
    with torch.no_grad():
        for block_size in (None, 16):
            caches = [LatentCache(model.config, 1, 64, block_size=block_size) for _ in range(2)]
            assert _make_ready(model, caches[0], prompt, 7, decode=True) > 0
            assert caches[0].lengths.tolist() == [0]
            logits = [[model(part, cache=cache) for part in prompt.split(7, 1)] for cache in caches]
            assert all(torch.equal(*pair) for pair in zip(*logits, strict=True))
            assert torch.equal(caches[0].block_tables, caches[1].block_tables)


def test_a_seed_repeats_the_draws() -> None:
    model = small()

    def once(seed: int) -> list[int]:
        return list(generate(model, [1, 2], max_new_tokens=30, sampling=Sampling(1.0, seed=seed)))

    assert once(1) == once(1) != once(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--max-new-tokens", "256"], "1 prompt tokens and 256 new tokens exceed"),
        (["--prompt", "x", "--max-new-tokens", "0"], "max-new-tokens is 0: expected 1 or more"),
        (["--prompt", "x", "--chunk-size", "0"], "chunk-size is 0: expected 1 or more"),
        (["--prompt", "x", "--block-size", "0"], "block-size is 0: expected 1 or more"),
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1.0: expected 0 or more"),
        (["--prompt", "x", "--top-p", "0"], "top-p is 0.0: expected more than 0"),
        (["--prompt", "x", "--top-k", "-1"], "top-k is -1: expected 0 or more"),
        (["--prompt", "x", "--temperature", "nan"], "temperature is nan: expected 0 or more"),
        (["--prompt", "x", "--seed", str(10**20)], f"seed is {10**20}: expected -9223372036854775808 to 1844674407370"),
        (["--prompt", "x", "--seed", str(-(10**19))], f"seed is -{10**19}: expected"),
        (["--prompt", "x", "--max-new-tokens", str(10**30)], "1 prompt tokens and 1000000000000000000000000000"),
        (["--prompt", "x", "--device", "cuda:99"], "--device is cuda:99: this machine has "),
        (["--prompt", "x", "--device", "tpu"], "--device is tpu: expected cpu, cuda or cuda:NUMBER"),
        (["--prompt", "x", "--device", "meta"], "--device is meta: expected cpu, cuda or cuda:NUMBER"),
        (["--prompt", "x", "--device", "cuda:"], "--device is cuda:: expected cpu, cuda or cuda:NUMBER"),
        (["--prompt", "x\udcff"], "the prompt is not UTF-8"),
        (["--prompt", "x\udcff", "--chat"], "the prompt is not UTF-8"),
        (["--prompt-file", "/nowhere"], "/nowhere: No such file"),
        (["--prompt-file", "/"], "/: Is a directory"),
        (["--prompt-file", "/bin/true"], "/bin/true is not UTF-8: byte "),
    ],
)
def test_wrong_requests_are_one_line(
    checkpoint: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ictx(monkeypatch, "generate", "--checkpoint", checkpoint, *arguments) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_sizes_beyond_all_bounds_are_those_of_the_text(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--checkpoint", checkpoint, "--prompt", "x", "--max-new-tokens", 5]
    assert ictx(monkeypatch, *arguments) == 0
    text = capsys.readouterr().out
    assert ictx(monkeypatch, *arguments, "--chunk-size", 10**30, "--block-size", 10**30, "--top-k", 10**30) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["import", "--out", "out"]])
def test_weights_that_are_not_finite_are_refused_by_name(
    checkpoint: Path, tmp_path: Path, command: list[str], value: float,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model = load_pretrained(checkpoint)
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 3] = value
    save_pretrained(model, tmp_path / "model", checkpoint)
    assert ictx(monkeypatch, *command, "--checkpoint", tmp_path / "model") == 2
    printed = capsys.readouterr().err
    assert "tensor model.embed_tokens.weight contains NaN or infinity" in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_report_names_the_step_and_what_compiling_took() -> None:
    report = Report(prompt_tokens=5, new_tokens=11, prefill_seconds=0.5, decode_seconds=0.1)
    assert str(report).startswith("5 prompt tokens at 10 tokens/s, 11 new tokens at 100.0 tokens/s, cache")
    report.ready_seconds = 6.25
    assert str(report).endswith("; before that 6.2 s to compile and load kernels, decode step captured")
    report.uncaptured = uncaptured(small(moe=MOE), LatentCache(small(moe=MOE).config, 1, 8))
    assert str(report).endswith("decode step not captured (experts: the host needs the number of tokens of each)")
    dense = small()
    assert uncaptured(dense, LatentCache(dense.config, 1, 8)) == "device cpu has no CUDA graphs"


def test_the_command_streams_text_and_tells_speed_and_cache(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["generate", "--checkpoint", checkpoint, "--max-new-tokens", "20", "--chunk-size", "4"]
    assert ictx(monkeypatch, *arguments, "--prompt", "grün", "--cache-dtype", "bfloat16") == 0
    printed = capsys.readouterr()
    prompt = Vocabulary.load(checkpoint).encode("grün", chat=False)
    assert len(prompt) == 5, "ü has two bytes"
    model = load_pretrained(checkpoint)
    stop = Vocabulary.load(checkpoint).stop
    tokens = list(generate(model, prompt, max_new_tokens=20, stop=stop, cache_dtype=torch.bfloat16))
    text = Vocabulary.load(checkpoint).tokenizer.decode(tokens)
    assert printed.out.rstrip("\n").rstrip("�") == text.rstrip("�").rstrip("\n")
    assert re.search(
        r"5 prompt tokens at [\d,]+ tokens/s, \d+ new tokens at [\d,.]+ tokens/s, cache [\d.]+ MiB", printed.err
    )
    (tmp_path / "prompt").write_text("grün")
    assert ictx(monkeypatch, *arguments, "--prompt-file", tmp_path / "prompt", "--cache-dtype", "bfloat16") == 0
    assert capsys.readouterr().out == printed.out


def test_a_chat_uses_the_template(checkpoint: Path, tmp_path: Path) -> None:
    vocabulary = Vocabulary.load(checkpoint)
    assert vocabulary.encode("hi", chat=True) == vocabulary.encode(f"user: hi{TURN}a", chat=False)
    assert vocabulary.stop == {256, 257}
    for file in ("tokenizer.json", "generation_config.json"):
        (tmp_path / file).write_bytes((checkpoint / file).read_bytes())
    with pytest.raises(UserError, match="no chat template: omit --chat"):
        Vocabulary.load(tmp_path).encode("hi", chat=True)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="exported without a tokenizer"):
        Vocabulary.load(tmp_path)


def test_describe_tells_the_large_model_s_size_and_cache(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ictx(monkeypatch, "model", "describe", "ictx-1b") == 0
    lines = {line[:44].strip(): line[44:].strip() for line in capsys.readouterr().out.splitlines()}
    assert lines["total"] == "1,004,623,872"
    assert lines["8 GB"].endswith("266,731 (bfloat16, float16), 468,405 (int8, fp8)")
    # 656 bytes in each of 16 layers.
    for name in ("int8", "fp8"):
        assert lines[name] == "10,496 bytes/token, 0.32 GiB at 32k, 1.28 GiB at 128k, 10.25 GiB at 1M"
    assert "18,432 bytes/token, 0.56 GiB at 32k, 2.25 GiB at 128k, 18.00 GiB at 1M" in lines["float16"]
    assert ictx(monkeypatch, "model", "describe", "ictx-1b", "--context", "-1") == 2
    assert "--context is -1: expected 1 to 1048576" in capsys.readouterr().err
    assert ictx(monkeypatch, "model", "describe", "ictx-2b") == 2
    assert "configuration model/ictx-2b.yaml does not exist" in capsys.readouterr().err


def test_describe_says_where_no_cache_is_quantised() -> None:
    lines = list(describe(small(kv_lora_rank=64).config, 256))
    assert any("int8, fp8" in line and "only latents of 512 and keys of 64 values" in line for line in lines)
    assert not any("(int8" in line for line in lines)


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_a_quantised_cache_generates_what_a_like_one_does(stored: str) -> None:
    model, report = small().bfloat16(), Report()
    tokens = list(generate(model, list(range(20)), max_new_tokens=12, cache_dtype=stored, report=report))
    assert report.cache_bytes == (20 + 11) * 656 * 3
    # One forward over all tokens attends to the same rows: every token must be the likeliest, or close to it.
    cache = LatentCache(model.config, 1, 64, block_size=64, dtype=torch.bfloat16, stored=stored)
    with torch.inference_mode():
        logits = model(torch.tensor([[*range(20), *tokens[:-1]]]), cache=cache)[0, 19:].float()
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert (logits.amax(-1) - chosen <= 5e-2 * logits.abs().amax(-1)).all()


def test_a_cache_that_cannot_be_quantised_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--checkpoint", checkpoint, "--prompt", "x", "--cache-dtype", "int8"]
    assert ictx(monkeypatch, *arguments) == 2
    assert "keeps keys in the dtype of the weights, float32, which must have 16 bits" in capsys.readouterr().err
    assert ictx(monkeypatch, *arguments, "--dtype", "bfloat16", "--max-new-tokens", 4) == 0
    model = small(kv_lora_rank=64).bfloat16()
    with pytest.raises(UserError, match="latents of 64 and keys of 64 values: only those of 512"):
        list(generate(model, [1], max_new_tokens=2, cache_dtype="int8"))
    with pytest.raises(UserError, match="needs a cache in blocks"):
        list(generate(small().bfloat16(), [1], max_new_tokens=2, cache_dtype="int8", block_size=None))
    with pytest.raises(UserError, match="cache-dtype is int4: expected"):
        list(generate(small().bfloat16(), [1], max_new_tokens=2, cache_dtype="int4"))


def test_fp8_is_refused_where_the_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "capability", lambda device: 86)
    # Only dtype, device and capability are read, so no such GPU is needed.
    like = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda"))
    with pytest.raises(UserError, match=r"capability 8.6 has no fp8; use int8, which needs the same memory"):
        refuse_quantised("fp8", like, 64)  # type: ignore[arg-type]
    refuse_quantised("int8", like, 64)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, "int8", "fp8"])
def test_a_gpu_generates_by_the_captured_step(cache_dtype: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = small(vocab_size=4096).bfloat16().cuda(), list(range(40))
    captured: list[str] = []
    capture = DecodeStep.capture
    monkeypatch.setattr(DecodeStep, "capture", lambda self: captured.append("graph") or capture(self))
    tokens = list(generate(model, prompt, max_new_tokens=30, cache_dtype=cache_dtype))
    assert captured == ["graph"] and len(tokens) == 30
    assert list(generate(model, prompt, max_new_tokens=30, cache_dtype=cache_dtype, chunk_size=7))[:1] == tokens[:1]
    stop = frozenset([tokens[9]])
    stopped = list(generate(model, prompt, max_new_tokens=30, cache_dtype=cache_dtype, stop=stop))
    assert stopped == tokens[: tokens.index(tokens[9])]
    # At a high temperature the first draws differ from each other; a seed reproduces them.
    drawn = [
        list(generate(model, prompt, max_new_tokens=30, cache_dtype=cache_dtype, sampling=Sampling(5.0, seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.gpu
def test_what_is_compiled_is_in_no_rate(checkpoint: Path, tmp_path: Path) -> None:
    """The rate of the first use, which compiles everything, equals the next. Float32 weights become 16-bit weights."""
    save_pretrained(small(vocab_size=258), tmp_path / "model", checkpoint)
    printed = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "ictx", "generate", "--checkpoint", tmp_path / "model", "--prompt", "x" * 40],
            env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "the weights are float32: computing in " in done.stderr
        found = re.search(
            r"at ([\d,]+) tokens/s, .* at ([\d,.]+) tokens/s, .* ([\d.]+) s to .* step captured", done.stderr
        )
        assert found, done.stderr
        printed.append([float(number.replace(",", "")) for number in found.groups()])
    (prefill, decode, ready), (warm_prefill, warm_decode, warm_ready) = printed
    assert prefill > warm_prefill / 3 and decode > warm_decode / 3 and ready > warm_ready


def test_import_and_export_take_a_model_over(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for command in ("import", "export"):
        assert ictx(monkeypatch, command, "--checkpoint", checkpoint, "--out", tmp_path / command) == 0
        for file in checkpoint.iterdir():
            assert (tmp_path / command / file.name).read_bytes() == file.read_bytes(), file.name
    arguments = ["export", "--checkpoint", checkpoint, "--out", tmp_path / "half", "--dtype", "bfloat16"]
    assert ictx(monkeypatch, *arguments) == 0
    assert load_pretrained(tmp_path / "half").lm_head.weight.dtype == torch.bfloat16
    capsys.readouterr()
    assert ictx(monkeypatch, "export", "--checkpoint", checkpoint, "--out", checkpoint) == 2
    assert "expected another folder than the checkpoint's" in capsys.readouterr().err
    assert ictx(monkeypatch, *arguments, "--rescale") == 2
    assert "--rescale requires --dtype float16" in capsys.readouterr().err
    content = json.loads((tmp_path / "import" / "config.json").read_text())
    (tmp_path / "import" / "config.json").write_text(json.dumps(content | {"architectures": ["Other"]}))
    assert ictx(monkeypatch, "import", "--checkpoint", tmp_path / "import", "--out", tmp_path / "again") == 2
    assert "architectures is ['Other']" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_export_reads_a_run_s_checkpoint(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = load_pretrained(checkpoint)
    step = tmp_path / "run" / "checkpoints" / "step-00000007"
    save({"model": model.state_dict(), "losses": {"loss": 1.0}}, checkpoint_id=step, no_dist=True)
    settings = dataclasses.asdict(model.config)
    (tmp_path / "run" / "model.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["export", "--checkpoint", step, "--tokenizer", checkpoint, "--out", tmp_path / "out"]
    assert ictx(monkeypatch, *arguments) == 0
    for file in checkpoint.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    (tmp_path / "run" / "model.yaml").write_text(yaml.safe_dump(settings | {"hidden_size": 40}))
    capsys.readouterr()
    assert ictx(monkeypatch, *arguments) == 2
    assert f"checkpoint {step} does not match its run's model.yaml" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{{ {sys.executable} -m ictx model describe ictx-1b; echo status $? >&2; }} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == "status 141\n"
