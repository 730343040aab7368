"""Settings of conversations and preferences."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ictx.data.config import trusted_by_environment

Kind = Literal["sft", "dpo"]


@dataclass(frozen=True)
class ChatDataConfig:
    """How rows of conversations (`sft`) or of preferences (`dpo`) are prepared and read."""

    kind: Kind
    """`sft`: conversations; `dpo`: prompts with a chosen and a rejected answer."""
    validation_share: float = 0.05
    """Share of the prompts that are kept for validation; the text of a prompt decides, whatever its answers are."""
    seed: int = 0
    """Chooses the prompts for validation."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """A row without a usable conversation ends the command, or is counted, reported and left out."""
    longest_row: int = 4 << 20
    """Characters; a longer row is counted, reported and left out. Training drops what is longer than its sequences."""
    streaming: bool = True
    """Read data sets of the Hub over the network, instead of downloading them first."""
    dir: Path | None = None
    """Prepared data (training only)."""
    trusted_owners: tuple[int, ...] = ()
    """Numbers of users whose prepared data is used, besides one's own and root's."""
    trusted_dirs: tuple[Path, ...] = field(default_factory=trusted_by_environment)
    """Folders of prepared data that are used whoever owns them; in containers owners cannot be distinguished."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share is {self.validation_share}: expected more than 0 and less than 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: expected 0 or more")
        if self.longest_row < 1:
            raise ValueError(f"longest_row is {self.longest_row}: expected 1 or more")

    def identity(self) -> dict[str, Any]:
        """Returns the settings that the prepared rows depend on, once the rows are known."""
        return {name: getattr(self, name) for name in ("kind", "validation_share", "seed")}
