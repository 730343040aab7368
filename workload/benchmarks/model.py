"""Speed of the tiny model's forward pass and decode step, compared with transformers: same weights, threads, run.

    python benchmarks/model.py [--threads N]

Rounds alternate between the two, so that a busy machine slows both; the fastest round of each counts. Exits with
status 1 if ours is slower in any case.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DeepseekV3ForCausalLM, DynamicCache

from ictx.infer.cache import LatentCache
from ictx.model import ModelConfig, Transformer
from ictx.model.hf import save_pretrained

ROUNDS = 15
LEAST = 1.0
CONFIG = Path(__file__).parents[1] / "configs" / "model" / "tiny.yaml"


def fastest(ours: Callable[[], object], theirs: Callable[[], object], times: int) -> tuple[float, float]:
    """Returns the seconds per call of each, in the fastest of alternating rounds of `times` calls."""
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS):
        for number, call in enumerate((ours, theirs)):
            began = time.perf_counter()
            for _ in range(times):
                call()
            best[number] = min(best[number], (time.perf_counter() - began) / times)
    return best[0], best[1]


def report(name: str, ours: float, theirs: float) -> float:
    """Prints a line; returns our speed relative to theirs."""
    relation = theirs / ours
    print(f"{name:<38} ours {ours * 1e3:8.2f} ms, transformers {theirs * 1e3:8.2f} ms: {relation:.2f}×", flush=True)
    return relation


@torch.inference_mode()
def main() -> int:
    """Prints the comparisons; returns 1 if ours is slower in any case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of both (default: 2)")
    torch.set_num_threads(parser.parse_args().threads)
    config = ModelConfig.from_yaml(CONFIG)
    model = Transformer(config)
    model.init_weights(seed=0)
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "model")
        reference = DeepseekV3ForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32).eval()
    relations: list[float] = []
    for batch, length in ((8, 128), (1, 1024)):
        tokens = torch.randint(config.vocab_size, (batch, length))
        assert (model(tokens) - reference(tokens, use_cache=False).logits).abs().max() < 1e-4
        ours, theirs = fastest(lambda: model(tokens), lambda: reference(tokens, use_cache=False), 2)  # noqa: B023
        relations.append(report(f"forward, {batch} × {length} tokens", ours, theirs))
    for context in (128, 1024, 3968):
        tokens = torch.randint(config.vocab_size, (1, context))
        cache, their_cache = LatentCache(config, 1, config.max_position_embeddings, block_size=64), DynamicCache()
        model(tokens, cache=cache)
        reference(tokens, past_key_values=their_cache)
        step = tokens[:, :1]
        ours, theirs = fastest(
            lambda: model(step, cache=cache),  # noqa: B023
            lambda: reference(step, past_key_values=their_cache),  # noqa: B023
            5,
        )
        relations.append(report(f"decode step, {context} tokens in the cache", ours, theirs))

    return 0 if min(relations) >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
