"""A model and its tokenizer from a checkpoint, in the dtype and on the device that suit each other."""

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
        dtype: of the weights, by its name; `suitable_dtype` unless given.
        device: where to compute; a GPU where there is one unless given.

    Raises UserError naming what is wrong with the folder, its tokenizer or the device.
    """
    place = find_device(device)
    vocabulary = Vocabulary.load(checkpoint)
    chosen = CACHE_DTYPES[dtype] if dtype else suitable_dtype(checkpoint, place)
    model = load_pretrained(checkpoint, dtype=chosen, device=place)
    require_fit(vocabulary.tokenizer, model.config.vocab_size, checkpoint / TOKENIZER_FILE)
    return model, vocabulary


def find_device(name: str | None) -> torch.device:
    """Returns the device of that name, or the one to take. Raises UserError where the machine has no such."""
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
    """Returns the dtype to compute in: the checkpoint's, but on a GPU 16 bits, which its kernels are made for."""
    stored = stored_dtype(checkpoint)
    if device.type != "cuda" or stored != torch.float32:
        return stored
    dtype = dispatch.half(dispatch.capability(device))
    name = str(dtype).removeprefix("torch.")
    print(f"the weights are float32: computing in {name}; --dtype float32 is exact and slower", file=sys.stderr)
    return dtype
