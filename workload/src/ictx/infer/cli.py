"""The command line of inference: `ictx generate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ictx.errors import UserError
from ictx.folder import read_text

DTYPES = ("float32", "bfloat16", "float16")
QUANTISED = ("int8", "fp8")
GENERATE_EXAMPLES = """
examples:
  ictx generate --checkpoint runs/1/export --prompt 'def main():'
  ictx generate --checkpoint model --prompt-file book.txt --chunk-size 2048 --temperature 0.7 --top-p 0.9 --seed 1
"""


def register(areas: Any) -> None:
    """Adds the command to `ictx`."""
    generate = areas.add_parser(
        "generate",
        help="generate a continuation of a prompt",
        epilog=GENERATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    generate.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="folder of an exported model")
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="prompt text")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="file with the prompt text")
    generate.add_argument("--chat", action="store_true", help="apply the chat template to the prompt as a user's turn")
    generate.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="maximum number of new tokens (default: 128)"
    )
    generate.add_argument(
        "--chunk-size", type=int, default=512, metavar="N", help="tokens per prefill step (default: 512)"
    )
    generate.add_argument(
        "--block-size", type=int, default=64, metavar="N", help="tokens per cache block (default: 64)"
    )
    generate.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0: greedy (default: 0)")
    generate.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="sample from the N likeliest tokens; 0: all (default: 0)"
    )
    generate.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens with this total probability (default: 1)",
    )
    generate.add_argument("--seed", type=int, help="random seed for reproducible sampling")
    generate.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights (default: the checkpoint's; 16 bits on a GPU)"
    )
    generate.add_argument(
        "--cache-dtype",
        choices=DTYPES + QUANTISED,
        help="dtype of the cache (default: the weights'); int8 and fp8 use 656 bytes per token and layer; fp8 needs "
        "compute capability 8.9",
    )
    generate.add_argument("--device", help="cpu, cuda or cuda:NUMBER (default: a GPU if there is one)")
    generate.set_defaults(run=run_generate)


def run_generate(arguments: argparse.Namespace) -> int:
    """Runs `ictx generate`."""
    import torch

    from ictx.infer.generate import Report, generate
    from ictx.infer.loading import load
    from ictx.infer.sampling import Sampling
    from ictx.model.cache import CACHE_DTYPES

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    if arguments.block_size < 1:
        raise UserError(f"block-size is {arguments.block_size}: expected 1 or more")
    text = arguments.prompt if arguments.prompt is not None else read_text(arguments.prompt_file)
    model, vocabulary = load(arguments.checkpoint, arguments.dtype, arguments.device)
    report = Report()
    tokens = generate(
        model,
        vocabulary.encode(text, arguments.chat),
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        stop=vocabulary.stop,
        chunk_size=arguments.chunk_size,
        block_size=arguments.block_size,
        cache_dtype=CACHE_DTYPES.get(arguments.cache_dtype, arguments.cache_dtype),
        report=report,
    )
    try:
        vocabulary.stream(tokens, lambda piece: print(piece, end="", flush=True))
    except torch.OutOfMemoryError as error:
        device = model.lm_head.weight.device
        raise UserError(
            f"{device} has too little memory: lower --max-new-tokens or --chunk-size, or set --cache-dtype int8"
        ) from error
    print(flush=True)
    print(report, file=sys.stderr)
    return 0
