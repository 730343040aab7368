"""A process that launches kernels and prints which ones Triton compiled, and which ones it found in a cache.

Arguments: one of the functions below, and the compute capability of a simulated GPU, or of the real one if there is
a GPU to launch on.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from ictx.infer.cache import LatentCache
from ictx.infer.decode_step import DecodeStep
from ictx.infer.generate import generate
from ictx.kernels.build.offline import standing_for
from ictx.kernels.next_token.op import choose_likeliest
from ictx.model import ModelConfig, Transformer

META = torch.device("meta")
CONFIG = replace(ModelConfig.named("ictx-1b-128k"), num_hidden_layers=2)


def model_of(dtype: torch.dtype, device: torch.device) -> Transformer:
    """Returns a model with the widths of the shipped configuration."""
    with META:
        model = Transformer(CONFIG).to(dtype).eval()
    if device != META:
        model = model.to_empty(device=device)
        model.init_weights(seed=7)
    return model


def served(target: int) -> None:
    """Prefills and decodes with lengths, batches and counts other than those of `ictx kernels build`."""
    for dtype in (torch.float16, torch.bfloat16)[: 1 if target < 80 else 2]:
        model = model_of(dtype, META)
        for batch, block_size, stored in ((1, 64, None), (3, 16, None), (1, None, None), (32, 64, "int8")):
            cache = LatentCache(CONFIG, batch, 5000, block_size=block_size, dtype=dtype, stored=stored, device=META)
            with torch.no_grad():
                for tokens in (1000, 77, 5):
                    model(torch.zeros(batch, tokens, dtype=torch.int64, device=META), cache=cache, last_only=True)
                for count in (1, 16, 33):
                    step = DecodeStep(model, cache, torch.zeros(batch, dtype=torch.int64, device=META), count)
                    step()


def trained(target: int) -> None:
    """Trains a step."""
    tokens = torch.zeros(3, 300, dtype=torch.int64, device=META)
    model_of(torch.bfloat16, META).train()(tokens).float().sum().backward()


def likeliest(target: int) -> None:
    """Launches two small kernels."""
    choose_likeliest(
        *(
            torch.zeros(shape, dtype=kind, device=META)
            for shape, kind in (((1, 65536), torch.float16), (1, torch.int64))
        )
    )


def generated(target: int) -> None:
    """Generates on this machine's GPU."""
    device = torch.device("cuda")
    model = model_of(torch.bfloat16 if target >= 80 else torch.float16, device)
    for cache_dtype in (None, "int8"):
        assert len(list(generate(model, list(range(700)), max_new_tokens=9, cache_dtype=cache_dtype))) == 9


def main() -> None:
    """Runs the function that the arguments name."""
    found: dict[str, list[str]] = {"compiled": [], "found": []}

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        found["found" if cache_hit else "compiled"].append(src.name)

    knobs.compilation.listener = listen
    function, target = globals()[sys.argv[1]], int(sys.argv[2])
    if function is generated:
        function(target)
    else:
        run = JITFunction.run

        def ready(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            """Compiles without a launch."""
            return run(self, *arguments, grid=grid, warmup=True, **options)

        JITFunction.run = ready
        with standing_for(target):
            function(target)
    print(json.dumps(found))


main()
