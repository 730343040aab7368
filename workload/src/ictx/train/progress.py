"""What a run has come to, besides its weights: it goes into checkpoints, and a start goes on from there."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field

RECENT, LEAST = 128, 32
"""Steps that a spike is measured against, as in OLMo 2 (arXiv:2501.00656, section 3.1); as many are needed at least."""


@dataclass
class Progress:
    """Counts since the run's beginning."""

    tokens: int = 0
    """Tokens that steps were made of."""
    skipped_steps: int = 0
    """Steps that changed no weights."""
    roll_backs: int = 0
    """Times that the run went back to a checkpoint."""
    parent_loss: float | None = None
    """Validation loss before the first step, in nats a token, of a stage that begins with a parent."""
    recent: list[tuple[float, float]] = field(default_factory=list)
    """Loss and gradient norm of the last steps that had finite ones, skipped ones among them."""

    def is_spike(self, loss: float, norm: float, deviations: float) -> bool:
        """Whether a step's loss or gradient norm is so many standard deviations above the mean of the last ones."""
        if not deviations or len(self.recent) < LEAST:
            return False
        return any(
            value > statistics.fmean(earlier) + deviations * statistics.pstdev(earlier)
            for value, earlier in zip((loss, norm), zip(*self.recent, strict=True), strict=True)
        )

    def note(self, loss: float, norm: float) -> None:
        """Adds a step to the last ones."""
        self.recent = [*self.recent, (loss, norm)][-RECENT:]

    def dump(self) -> str:
        """Returns the text that `load` reads."""
        return json.dumps(asdict(self))

    def load(self, text: str) -> None:
        """Takes over what an earlier start noted; what that did not know stays."""
        for name, value in json.loads(text).items():
            if hasattr(self, name):
                setattr(self, name, value)
