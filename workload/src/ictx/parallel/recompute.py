"""Activation recompute: activations take most of the memory for long sequences."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ictx.kernels.attention import flash4
from ictx.kernels.attention import operation as attention
from ictx.model.moe import Router
from ictx.model.transformer import Layer
from ictx.parallel import context, offload

MODES = ("none", "selective", "full")
"""Recompute nothing; everything except attention's result; everything."""
ATEN = torch.ops.aten
KEPT = {
    attention.OPERATION,
    context.OPERATION,
    flash4.OPERATION,
    ATEN._scaled_dot_product_cudnn_attention.default,
    ATEN._scaled_dot_product_efficient_attention.default,
    ATEN._scaled_dot_product_flash_attention.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Operations whose results selective mode keeps: at 32k a fifth of the forward time, for 4 kB per token and layer."""

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def selective_contexts() -> Contexts:
    """The `context_fn` of torch.utils.checkpoint for selective mode."""
    return cast(Contexts, create_selective_checkpoint_contexts(_policy))  # type: ignore[no-untyped-call]


@contextmanager
def _uncounted(routers: list[Router], inner: AbstractContextManager[Any]) -> Iterator[None]:
    """Disables counting of routed tokens: they were counted in the first forward pass."""
    for router in routers:
        router.counts = False
    try:
        with inner:
            yield
    finally:
        for router in routers:
            router.counts = True


def recompute(layer: Layer, mode: str, offloaded: bool = False) -> None:
    """Makes a layer recompute activations in the backward pass, according to a mode of `MODES`.

    Replaces the layer's `forward`, not the layer, so that weight names and sharding hooks are preserved.

    Args:
        offloaded: keep saved tensors, including the layer's input, in host memory; not supported by torch.compile.
    """
    if mode == "none":
        return
    forward = layer.forward
    # Only an adapter's dropout draws random numbers (`ictx.train.lora`), which must be the same in both passes.
    random = any(getattr(module, "dropout", 0) for module in layer.modules())
    run = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=random)
    routers = [module for module in layer.modules() if isinstance(module, Router)]
    keeping = functools.partial(create_selective_checkpoint_contexts, _policy)
    if offloaded:
        keeping = functools.partial(offload.contexts, KEPT.__contains__)

    def selective(*args: Any) -> Any:
        # Created here: torch.compile does not accept a context_fn from an outer scope.
        return run(forward, *args, context_fn=functools.partial(create_selective_checkpoint_contexts, _policy))

    def full(*args: Any) -> Any:
        return run(forward, *args)

    def any_way(*args: Any) -> Any:
        def contexts() -> Contexts:
            first, again = keeping() if mode == "selective" else (nullcontext(), nullcontext())
            return first, _uncounted(routers, again)

        # These hooks apply to the checkpoint's saved inputs; the function that it runs has separate hooks.
        with offload.hooks() if offloaded else nullcontext():
            return run(forward, *args, context_fn=contexts)

    replaced: Any = any_way if routers or offloaded else {"selective": selective, "full": full}[mode]
    layer.forward = replaced  # type: ignore[method-assign]
