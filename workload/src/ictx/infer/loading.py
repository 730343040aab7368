"""Loads a model and its tokenizer from a checkpoint, with a suitable dtype and device."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ictx.data.tokenizer import TOKENIZER_FILE, require_fit
from ictx.errors import UserError
from ictx.infer.vocabulary import Vocabulary
from ictx.kernels import dispatch
from ictx.model import Transformer
from ictx.model.cache import CACHE_DTYPES
from ictx.model.hf import load_pretrained, stored_dtype
from ictx.settings import shown


def load(checkpoint: Path, dtype: str | None = None, device: str | None = None) -> tuple[Transformer, Vocabulary]:
    """Returns the model and the tokenizer of a folder.

    Args:
        dtype: name of the weights' dtype; default: `suitable_dtype`.
        device: cpu, cuda or cuda:NUMBER; default: a GPU if there is one.

    Raises UserError for an invalid folder, tokenizer or device.
    """
    place = find_device(device)
    vocabulary = Vocabulary.load(checkpoint)
    chosen = CACHE_DTYPES[dtype] if dtype else suitable_dtype(checkpoint, place)
    model = load_pretrained(checkpoint, dtype=chosen, device=place)
    require_fit(vocabulary.tokenizer, model.config.vocab_size, checkpoint / TOKENIZER_FILE)
    return model, vocabulary


def find_device(name: str | None) -> torch.device:
    """Returns the named or the default device. Raises UserError if the machine does not have it."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {shown(name)}: expected cpu, cuda or cuda:NUMBER")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(
            f"--device is {name}: this machine has {count or 'no'} GPU{'s' * (count != 1)} that PyTorch can use"
        )
    return device


def suitable_dtype(checkpoint: Path, device: torch.device) -> torch.dtype:
    """Returns the checkpoint's dtype; on a GPU a 16-bit dtype instead of float32, because the kernels need 16 bits."""
    stored = stored_dtype(checkpoint)
    if device.type != "cuda" or stored != torch.float32:
        return stored
    dtype = dispatch.half(dispatch.capability(device))
    name = str(dtype).removeprefix("torch.")
    print(f"the weights are float32: computing in {name} (--dtype float32 is exact, but slower)", file=sys.stderr)
    return dtype
