"""The latent cache of a model: storage and attention."""

from __future__ import annotations

from torch import Tensor

from ictx.infer.attention_cached import attend
from ictx.infer.storage import LatentStorage
from ictx.model.attention import LatentAttention, Mode
from ictx.model.cache import Slots
from ictx.model.rope import Rotations


class LatentCache(LatentStorage):
    """Normed latents and rotated keys of a batch of sequences; the `cache` argument of a `Transformer`."""

    def attend(
        self,
        attention: LatentAttention,
        layer: int,
        q_nope: Tensor,
        q_rope: Tensor,
        new_bse: Tensor,
        rope: Rotations,
        slots: Slots,
        mode: Mode,
    ) -> Tensor:
        """See `model.attention.Cache`."""
        return attend(attention, self, layer, q_nope, q_rope, new_bse, rope, slots, mode)
