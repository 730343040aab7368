"""The command line of evaluations: `ictx eval perplexity|needle|ruler|harness|judge|judge-model|report`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ictx.errors import UserError
from ictx.settings import command_line

if TYPE_CHECKING:
    from ictx.evaluate.results import Result
    from ictx.evaluate.subject import Subject
    from ictx.infer.likelihood import Prefill

RAW = argparse.RawDescriptionHelpFormatter
DTYPES = ("float32", "bfloat16", "float16")
COMMON = """
The model is a folder, models:/NAME/VERSION or models:/NAME@ALIAS (resolved once). Finished samples stay in --out: the
same command goes on after an interruption. What is measured of a registered version is logged on it: tags ictx.eval.*
for `ictx promote`, and an MLflow run with the tables and pictures.
"""
PERPLEXITY_EXAMPLES = f"""{COMMON}
examples:
  ictx eval perplexity --model models:/ictx-1b@candidate --data /shared/data/0123456789abcdef --out evals/3/perplexity
  ictx eval perplexity --model runs/7/export --files book.txt docs/ --length 32768 --samples 8 --out evals/books
"""
NEEDLE_EXAMPLES = f"""{COMMON}
Lengths beyond the model's max_position_embeddings are refused without --beyond, which shows what extending buys.

examples:
  ictx eval needle --model models:/ictx-1b/3 --lengths 32768 131072 1048576 --out evals/3/needle
  ictx eval needle --model runs/7/export --lengths 512 1024 --depths 0 0.5 1 --samples 4 --beyond --out evals/before
"""
RUN_EXAMPLES = """
A configuration has the options of several evaluations, of one model and of those that it is compared with; numbers of
all come to run.dir/result.json. The job of the stage `eval` runs this.

examples:
  ictx eval run --config eval/tiny.yaml --set init=models:/ictx-tiny/3 --set data.dir=data/… --set run.dir=runs/5
"""


def register(areas: Any) -> None:
    """Adds `eval` to the areas of the command line."""
    commands = areas.add_parser("eval", help="evaluations").add_subparsers(metavar="COMMAND", required=True)
    stage = commands.add_parser(
        "run",
        parents=[command_line()],
        help="several evaluations, as a configuration wants them",
        epilog=RUN_EXAMPLES,
        formatter_class=RAW,
    )
    stage.set_defaults(run=run_stage)
    _add_perplexity(commands)
    _add_needle(commands)


def _add_common(parser: argparse.ArgumentParser, samples: int, each: str) -> None:
    """Adds what every evaluation of a model takes."""
    parser.add_argument("--model", required=True, help="folder, models:/NAME/VERSION or models:/NAME@ALIAS")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where samples, result and pictures go")
    parser.add_argument("--samples", type=int, default=samples, metavar="N", help=f"{each} ({samples})")
    parser.add_argument("--seed", type=int, default=0, help="chooses the samples (0)")
    parser.add_argument(
        "--models", type=Path, metavar="DIR", help="where registered models are fetched to (--out/../models)"
    )
    parser.add_argument("--no-log", dest="log", action="store_false", help="leave the registered version as it is")


def _add_compute(parser: argparse.ArgumentParser) -> None:
    """Adds how a local model computes."""
    parser.add_argument("--chunk-size", type=int, default=2048, metavar="N", help="tokens of a prefill step (2048)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (the checkpoint's)")
    parser.add_argument(
        "--cache-dtype", choices=(*DTYPES, "int8", "fp8"), help="dtype of the cache (that of the weights)"
    )
    parser.add_argument("--device", help="where to compute (a GPU where there is one)")


def _add_perplexity(commands: Any) -> None:
    parser = commands.add_parser(
        "perplexity",
        help="perplexity and bits per byte, by position",
        epilog=PERPLEXITY_EXAMPLES,
        formatter_class=RAW,
    )
    _add_common(parser, 64, "windows")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--data", type=Path, metavar="DIR", help="what `ictx data prepare` printed")
    text.add_argument("--files", nargs="+", metavar="FILE", help="files or folders of text, .jsonl or .parquet")
    parser.add_argument("--split", choices=("train", "validation"), default="validation", help="of --data (validation)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a window (4096, or the model's context)")
    parser.add_argument("--whole-documents", action="store_true", help="windows of --data begin where documents do")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="windows at a time (1)")
    _add_compute(parser)
    parser.set_defaults(run=run_perplexity)


def _add_needle(commands: Any) -> None:
    parser = commands.add_parser(
        "needle",
        help="find a sentence in a long text, by length and depth",
        epilog=NEEDLE_EXAMPLES,
        formatter_class=RAW,
    )
    _add_common(parser, 1, "needles of each length and depth")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="N", help="tokens of a text (powers of 2 to the context)"
    )
    parser.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[0, 0.25, 0.5, 0.75, 1],
        metavar="D",
        help="places (0 0.25 0.5 0.75 1)",
    )
    parser.add_argument("--haystack", type=Path, metavar="FILE", help="text around the needle (Python's own help)")
    parser.add_argument("--beyond", action="store_true", help="also read more tokens than the model's context")
    _add_compute(parser)
    parser.set_defaults(run=run_needle)


def run_stage(arguments: argparse.Namespace) -> int:
    """`ictx eval run`."""
    from ictx.evaluate.stage import main

    def run(commands: list[list[str]]) -> int:
        parser = argparse.ArgumentParser(prog="ictx")
        register(parser.add_subparsers())
        # What is wrong with one of them shows before the first one computes anything.
        parsed = [parser.parse_args(["eval", *words]) for words in commands]
        for words, each in zip(commands, parsed, strict=True):
            print(f"ictx eval {shlex.join(words)}", flush=True)
            if status := each.run(each):
                return int(status)
        return 0

    return main(arguments.config, arguments.set, run)


def _subject(arguments: argparse.Namespace) -> Subject:
    from ictx.evaluate.subject import find

    return find(arguments.model, arguments.out, _cache(arguments))


def _cache(arguments: argparse.Namespace) -> Path:
    given: Path | None = arguments.models
    return given or Path(arguments.out.resolve().parent, "models")


def _prefill(arguments: argparse.Namespace) -> Prefill:
    from ictx.infer.likelihood import Prefill
    from ictx.model.cache import CACHE_DTYPES

    dtype = CACHE_DTYPES.get(arguments.cache_dtype, arguments.cache_dtype)
    return Prefill(arguments.chunk_size, dtype, getattr(arguments, "beyond", False))


def _publish(arguments: argparse.Namespace, subject: Subject, result: Result) -> int:
    """Writes a result, prints its numbers, and logs it on the version."""
    from ictx.evaluate.results import log

    result.write(arguments.out)
    for name, value in result.metrics.items():
        if not name.endswith(("_low", "_high")):
            low, high = result.metrics.get(f"{name}_low"), result.metrics.get(f"{name}_high")
            interval = "" if low is None or high is None else f" (95 %: {low:.4g} to {high:.4g})"
            print(f"{name}: {value:.4g}{interval}")
    print(f"{subject}: {arguments.out}")
    if subject.ref and arguments.log:
        print(f"logged on {subject}, tables and pictures in MLflow run {log(subject, result, arguments.out)}")
    return 0


def run_perplexity(arguments: argparse.Namespace) -> int:
    """`ictx eval perplexity`."""
    from ictx.evaluate import perplexity, plots
    from ictx.evaluate.results import Result
    from ictx.evaluate.samples import finish, open_samples, require_samples
    from ictx.infer.loading import load
    from ictx.model.hf_config import read_hf_config

    require_samples(arguments.samples)
    prefill, subject = _prefill(arguments), _subject(arguments)
    context = read_hf_config(subject.folder)[0].max_position_embeddings
    length = min(4096, context) if arguments.length is None else arguments.length
    if not 1 <= length <= context:
        raise UserError(f"length is {length}: expected 1 to the model's max_position_embeddings, {context}")
    model, vocabulary = load(subject.folder, arguments.dtype, arguments.device)
    if arguments.data:
        split, whole = arguments.split, arguments.whole_documents
        text = perplexity.prepared(arguments.data, vocabulary, length, arguments.samples, split, whole)
    else:
        text = perplexity.files(arguments.files, vocabulary, length, arguments.samples)
    sizes = perplexity.bytes_of_tokens(vocabulary.tokenizer)
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    settings = {"kind": "perplexity", "model": subject.digest, "dtype": dtype, **text.origin}
    with open_samples(arguments.out, settings) as samples:
        records = finish(
            "perplexity",
            text.plan(),
            samples,
            lambda windows: list(perplexity.measure(model, windows, sizes, prefill)),
            arguments.batch_size,
        )
    found = perplexity.sum_up(records, len(text.windows[0]) - 1)
    buckets = found.pop("buckets")
    points = {"perplexity": [(bucket["last"] + 1, bucket["perplexity"]) for bucket in buckets]}
    plots.curve(arguments.out / "perplexity.png", f"{subject}", "position", "perplexity", points)
    names = ("perplexity", "perplexity_low", "perplexity_high", "bits_per_byte")
    metrics = {name: found[name] for name in names}
    return _publish(
        arguments, subject, Result("perplexity", str(subject), text.origin, metrics, {"buckets": buckets, **found})
    )


def run_needle(arguments: argparse.Namespace) -> int:
    """`ictx eval needle`."""
    from ictx.evaluate import needle, plots
    from ictx.evaluate.results import Result
    from ictx.evaluate.samples import finish, open_samples
    from ictx.infer.loading import load
    from ictx.model.hf_config import read_hf_config

    prefill, subject = _prefill(arguments), _subject(arguments)
    context = read_hf_config(subject.folder)[0].max_position_embeddings
    lengths = arguments.lengths or _powers(context)
    planned = needle.plan(lengths, arguments.depths, arguments.samples)
    if max(lengths) > context and not arguments.beyond:
        raise UserError(f"lengths has {max(lengths):,}: the model's max_position_embeddings is {context:,} (--beyond)")
    model, vocabulary = load(subject.folder, arguments.dtype, arguments.device)
    text = needle.haystack_text(arguments.haystack)
    haystack = needle.Haystack.of(text, vocabulary)
    for each in planned:
        # What cannot be built is reported before anything is computed.
        if each.content.number == 0:
            needle.build(each.content, haystack, vocabulary, arguments.seed)
    measured = {
        "lengths": sorted(set(lengths)),
        "depths": sorted(set(arguments.depths)),
        "samples": arguments.samples,
        "seed": arguments.seed,
        "haystack": needle.fingerprint(text),
    }
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    with open_samples(
        arguments.out, {"kind": "needle", "model": subject.digest, "dtype": dtype, **measured}
    ) as samples:
        records = finish(
            "needle",
            planned,
            samples,
            lambda needles: [
                needle.measure(model, vocabulary, haystack, each, prefill, arguments.seed) for each in needles
            ],
        )
    found = needle.sum_up(records)
    plots.heat_map(arguments.out / "needle.png", f"{subject}: needles found", found["grid"], "found")
    metrics = {name: value for name, value in found.items() if isinstance(value, float)}
    details = {"lengths": found["lengths"], "grid": found["grid"]}
    return _publish(arguments, subject, Result("needle", str(subject), measured, metrics, details))


def _powers(context: int) -> list[int]:
    """Returns four lengths up to the context, each twice the one before."""
    return [context >> back for back in (3, 2, 1, 0)]
