"""Progress of a run besides its weights; part of checkpoints."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field

RECENT, LEAST = 128, 32
"""Recent steps that define a spike, and their minimum number, as in OLMo 2 (arXiv:2501.00656, section 3.1)."""


@dataclass
class Progress:
    """Counts since the start of the run."""

    tokens: int = 0
    """Tokens of all steps."""
    skipped_steps: int = 0
    """Steps that were skipped."""
    roll_backs: int = 0
    """Roll-backs to a checkpoint."""
    parent_loss: float | None = None
    """Validation loss (nats per token) of the parent, before the first step; None without a parent."""
    recent: list[tuple[float, float]] = field(default_factory=list)
    """Loss and gradient norm of the last steps with finite values, including skipped steps."""

    def is_spike(self, loss: float, norm: float, deviations: float) -> bool:
        """Whether loss or gradient norm exceeds the mean of the recent steps by `deviations` standard deviations."""
        if not deviations or len(self.recent) < LEAST:
            return False
        return any(
            value > statistics.fmean(earlier) + deviations * statistics.pstdev(earlier)
            for value, earlier in zip((loss, norm), zip(*self.recent, strict=True), strict=True)
        )

    def note(self, loss: float, norm: float) -> None:
        """Adds a step to `recent`."""
        self.recent = [*self.recent, (loss, norm)][-RECENT:]

    def dump(self) -> str:
        """Returns the text that `load` reads."""
        return json.dumps(asdict(self))

    def load(self, text: str) -> None:
        """Restores values from `dump`; values that it lacks stay unchanged."""
        for name, value in json.loads(text).items():
            if hasattr(self, name):
                setattr(self, name, value)
