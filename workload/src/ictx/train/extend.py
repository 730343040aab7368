"""Context extension: trains a model for longer contexts, with YaRN's scaled positions (arXiv:2309.00071)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ictx.data.loader import Batches
from ictx.errors import UserError
from ictx.train.child import Child
from ictx.train.config import ExtendConfig
from ictx.train.init import Parent
from ictx.train.pretrain import OnCorpus
from ictx.train.ranks import Ranks, on_first


class Extension(OnCorpus, Child):
    """The stage `extend`: next-token prediction as in pretraining, from the parent's weights."""

    config: ExtendConfig

    name, settings = "extend", ExtendConfig
    changeable = ("yarn", "yarn.factor", "yarn.mscale", "yarn.mscale_all_dim", "max_position_embeddings")
    remedy = "raise model.yarn.factor"

    @classmethod
    def completed(cls, content: Mapping[str, Any], parent: Parent) -> dict[str, Any]:
        """Returns settings completed from the parent, including data.vocab_size."""
        whole = super().completed(content, parent)
        before, now = parent.config.yarn, whole["model"]["yarn"]
        if before and now["factor"] < before.factor:
            raise UserError(
                f"model.yarn.factor is {now['factor']:g}: expected at least that of {parent.init}, {before.factor:g}"
            )
        return {**whole, "data": {"vocab_size": parent.config.vocab_size, **whole.get("data", {})}}

    def batches(self, ranks: Ranks) -> Batches:
        """Returns the packed corpus in the run's order. Raises UserError if it does not match parent and settings."""
        batches = super().batches(ranks)
        on_first(lambda: self.parent.check_tokenizer(self.data_dir))
        return batches
