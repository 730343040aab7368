"""The command line: `ictx model describe`, `ictx export`, `ictx import`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ictx.errors import UserError
from ictx.folder import read_text

if TYPE_CHECKING:
    from torch import Tensor

    from ictx.model import Transformer

DTYPES = ("float32", "bfloat16", "float16")
RAW = argparse.RawDescriptionHelpFormatter
DESCRIBE_EXAMPLES = """
examples:
  ictx model describe ictx-1b
  ictx model describe configs/model/tiny-moe.yaml --context 4096
"""
EXPORT_EXAMPLES = """
A checkpoint is a model's folder, such as the `export` of a run, or a `step-…` folder of a run's `checkpoints`. The
output folder is created only when it is complete. For float16, activations are measured on a text first: if one comes
within 4× of float16's maximum, the export fails with its name, or with --rescale weights are scaled so that the model
computes the same function with smaller activations.

examples:
  ictx export --checkpoint runs/1/export --out model-fp16 --dtype float16 --rescale
  ictx export --checkpoint runs/1/checkpoints/step-00000100 --tokenizer data/0123456789abcdef --out model
"""
IMPORT_EXAMPLES = """
Reads a DeepseekV3ForCausalLM of another program, checks every tensor, and writes it like `ictx export`: in shards with
checksums, with the tokenizer.

examples:
  ictx import --checkpoint from-transformers --out model
"""


def register(areas: Any) -> None:
    """Adds the commands to `ictx`."""
    model = areas.add_parser("model", help="describe model configurations").add_subparsers(
        metavar="COMMAND", required=True
    )
    describe = model.add_parser(
        "describe",
        help="print parameters, cache size, operations and memory of a configuration",
        epilog=DESCRIBE_EXAMPLES,
        formatter_class=RAW,
    )
    describe.add_argument("config", help="name of a shipped configuration, or a YAML file")
    describe.add_argument(
        "--context", type=int, help="tokens for which operations are counted (default: the model's context)"
    )
    describe.set_defaults(run=run_describe)

    export = areas.add_parser(
        "export", help="export a model for Hugging Face and vLLM", epilog=EXPORT_EXAMPLES, formatter_class=RAW
    )
    _add_conversion(export)
    export.add_argument(
        "--rescale", action="store_true", help="scale weights for float16 without changing the function"
    )
    export.add_argument(
        "--calibration", type=Path, metavar="FILE", help="text for the measurement (default: Python's help topics)"
    )
    export.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="folder of the tokenizer (default: the checkpoint's)"
    )
    export.set_defaults(run=run_export)

    imported = areas.add_parser(
        "import", help="check and convert a DeepseekV3ForCausalLM", epilog=IMPORT_EXAMPLES, formatter_class=RAW
    )
    _add_conversion(imported)
    imported.set_defaults(run=run_export, rescale=False, calibration=None, tokenizer=None)


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="folder to read")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; replaces an older one")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the checkpoint's)")
    parser.add_argument(
        "--max-shard-size", type=int, default=1024, metavar="MIB", help="maximum file size (default: 1024)"
    )


def run_describe(arguments: argparse.Namespace) -> int:
    """Runs `ictx model describe`."""
    from ictx.model.config import ModelConfig
    from ictx.model.describe import describe

    config = ModelConfig.named(arguments.config)
    context = config.max_position_embeddings if arguments.context is None else arguments.context
    if not 1 <= context <= config.max_position_embeddings:
        raise UserError(f"--context is {context}: expected 1 to {config.max_position_embeddings}")
    for line in describe(config, context):
        print(line)
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Runs `ictx export` and `ictx import`."""
    import torch

    from ictx.data.tokenizer import TOKENIZER_FILE
    from ictx.model.hf import save_pretrained
    from ictx.model.hf_generation import Generation
    from ictx.train.checkpoint import is_checkpoint

    source, out = arguments.checkpoint, arguments.out
    if out.resolve() == source.resolve():
        raise UserError(f"--out is {out}: expected another folder than the checkpoint's")
    if arguments.max_shard_size < 1:
        raise UserError(f"--max-shard-size is {arguments.max_shard_size}: expected 1 or more")
    model = _model_of(source)
    stored = model.lm_head.weight.dtype
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else stored
    tokenizer = arguments.tokenizer or (source if (source / TOKENIZER_FILE).exists() else None)
    if arguments.rescale and dtype != torch.float16:
        raise UserError("--rescale requires --dtype float16")
    if dtype == torch.float16 != stored:
        _make_safe(model, tokenizer, arguments)
    # Not with another tokenizer: its generation config contains token ids.
    kept = None if arguments.tokenizer or is_checkpoint(source) else Generation.read(source)
    shard = arguments.max_shard_size << 20
    save_pretrained(model, out, tokenizer, dtype=dtype, max_shard_bytes=shard, generation=kept)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(f"{out}: {str(dtype).removeprefix('torch.')}, {size:,} bytes of weights")
    if tokenizer is None:
        print(f"without a tokenizer: {source} has none", file=sys.stderr)
    return 0


def _model_of(source: Path) -> Transformer:
    """Returns the model of a model's folder or of a training checkpoint."""
    from ictx.model.hf import load_pretrained
    from ictx.train.checkpoint import is_checkpoint, load_model

    return load_model(source) if is_checkpoint(source) else load_pretrained(source)


def _make_safe(model: Transformer, tokenizer: Path | None, arguments: argparse.Namespace) -> None:
    """Raises UserError with the activations that are too large for float16, after rescaling if requested."""
    from ictx.model.float16 import measure, require_float16, rescale

    # Measures in float32, in which activations do not overflow.
    model.float()
    batches = list(_calibration(model, tokenizer, arguments.calibration))
    amax = measure(model, batches)
    if not arguments.rescale:
        require_float16(amax, "export with --rescale, or as bfloat16")
    else:
        for line in rescale(model, amax):
            print(line)
        amax = measure(model, batches)
        require_float16(amax, "no scale of the weights changes that; export as bfloat16")
    name, value = max(amax.items(), key=lambda item: item[1])
    print(f"largest magnitude {value:,.1f} ({name})")


def _calibration(model: Transformer, tokenizer: Path | None, file: Path | None) -> Iterator[Tensor]:
    """Yields eight windows of text, spread over a file; random tokens without a tokenizer."""
    import torch

    from ictx.infer.vocabulary import Vocabulary

    length = min(512, model.config.max_position_embeddings)
    if tokenizer is None:
        if file:
            raise UserError("--calibration needs a tokenizer: give --tokenizer")
        print("no tokenizer: measuring with random tokens", file=sys.stderr)
        generator = torch.Generator().manual_seed(0)
        yield torch.randint(model.config.vocab_size, (8, length), generator=generator)
        return
    if file is None:
        from pydoc_data import topics

        text = "\n".join(topics.topics.values())
    else:
        text = read_text(file)
    tokens = torch.tensor(Vocabulary.load(tokenizer).encode(text, chat=False))
    if not len(tokens):
        raise UserError(f"{file} is empty: expected text")
    for start in range(0, max(len(tokens) - length, 0) + 1, max((len(tokens) - length) // 7, 1)):
        yield tokens[None, start : start + length]
