"""Settings of conversations and preferences."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ictx.data.config import trusted_by_environment

Kind = Literal["sft", "dpo"]


@dataclass(frozen=True)
class ChatDataConfig:
    """Preparation and reading of conversations (`sft`) or preferences (`dpo`)."""

    kind: Kind
    """`sft`: conversations; `dpo`: prompts with a chosen and a rejected answer."""
    validation_share: float = 0.05
    """Share of prompts held out for validation; selected by a hash of the prompt."""
    seed: int = 0
    """Random seed of the selection for validation."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """Handling of a row without a usable conversation: `refuse`: an error; `drop`: count, report and skip it."""
    longest_row: int = 4 << 20
    """Maximum characters; longer rows are counted, reported and skipped. Training skips rows longer than a window."""
    streaming: bool = True
    """Stream data sets of the Hub over the network, instead of downloading them first."""
    dir: Path | None = None
    """Prepared data (training only)."""
    trusted_owners: tuple[int, ...] = ()
    """User ids whose prepared data is trusted, besides one's own and root's."""
    trusted_dirs: tuple[Path, ...] = field(default_factory=trusted_by_environment)
    """Folders of prepared data that are trusted regardless of owner, because containers cannot distinguish owners."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}: expected more than 0 and less than 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: expected 0 or more")
        if self.longest_row < 1:
            raise ValueError(f"longest_row is {self.longest_row}: expected 1 or more")

    def identity(self) -> dict[str, Any]:
        """Returns the settings that the prepared rows depend on, besides the source rows."""
        return {name: getattr(self, name) for name in ("kind", "validation_share", "seed")}
