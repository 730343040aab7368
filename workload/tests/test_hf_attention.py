"""Our attention in transformers' model gives the results of transformers' attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import reference_of, small
from torch import Tensor

from ictx.model.hf_attention import register

TOKENS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(1))
RIGHT = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
LEFT = torch.tensor([[1] * 12, [0] * 5 + [1] * 7])


@pytest.fixture(scope="module")
def theirs() -> Any:
    return reference_of(small()).train()


def run(model: Any, attention: str, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the logits, and the gradient of their sum with respect to the embedding."""
    model.set_attn_implementation(attention)
    logits = model(use_cache=False, **inputs).logits
    mask = inputs.get("attention_mask", torch.ones(logits.shape[:2]))
    model.zero_grad()
    logits[mask.bool()].square().sum().backward()
    return logits[mask.bool()], model.model.embed_tokens.weight.grad.clone()


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": TOKENS},
        {"input_ids": TOKENS, "attention_mask": RIGHT},
        {"input_ids": TOKENS, "attention_mask": LEFT},
        {"input_ids": TOKENS[:1], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]])},
    ],
    ids=["whole rows", "padded behind", "padded before", "packed documents"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_sdpa(theirs: Any, inputs: dict[str, Tensor], checkpointing: bool) -> None:
    if checkpointing:
        theirs.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        theirs.gradient_checkpointing_disable()
    expected = run(theirs, "sdpa", **inputs)
    found = run(theirs, register(), **inputs)
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_a_cache_is_refused(theirs: Any) -> None:
    theirs.gradient_checkpointing_disable()
    theirs.set_attn_implementation(register())
    first = theirs(TOKENS, use_cache=True)
    with pytest.raises(ValueError, match="is for training"):
        theirs(TOKENS, past_key_values=first.past_key_values)
