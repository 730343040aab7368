"""Direct preference optimization (arXiv:2305.18290): raises the likelihood of chosen answers over rejected ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ictx.errors import UserError
from ictx.train.dpo_stage import PreferenceStage
from ictx.train.ranks import Ranks


class Preference(PreferenceStage):
    """The stage; trains with the engine of its settings."""

    def conduct(self, ranks: Ranks, directory: Path) -> int:
        """Runs the stage: see `ictx.train.run.main`."""
        if self.config.engine == "ictx":
            return super().conduct(ranks, directory)
        require_trl()
        from ictx.train import dpo_trl

        return dpo_trl.conduct(self, ranks, directory)


def require_trl() -> None:
    """Raises UserError if TRL is not installed."""
    for name in ("trl", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"dpo.engine is trl, but {name} is not installed: install it, or set dpo.engine=ictx")
