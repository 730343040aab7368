"""Where a run's model comes from: tags of the run and of the version that it registers, and the run's data set."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag

from ictx.registry import DATA_TAG, IMAGE_REF_TAG, PARENT_TAG, STAGE_TAG

CONTEXT_TAG = "mlflow.data.context"
"""MLflow's: what a data set is for."""
LONGEST_DIGEST = 36
"""Characters of a data set's digest that MLflow keeps."""


@dataclass(frozen=True)
class Lineage:
    """What a model is made of."""

    stage: str = ""
    """Kind of training, such as `extend`."""
    parent: str = ""
    """Model that it began with: `NAME/VERSION`, or `run:/FOLDER` where that was not registered; empty: none."""
    data: str = ""
    """Folder of its data."""
    fingerprint: str = ""
    """Fingerprint of its data."""

    @property
    def tags(self) -> dict[str, str]:
        """Those that are known."""
        reference, digest = (os.environ.get(name, "") for name in ("ICTX_IMAGE_REF", "ICTX_IMAGE_DIGEST"))
        image = f"{reference}@{digest}" if reference and digest else digest
        found = {STAGE_TAG: self.stage, PARENT_TAG: self.parent, DATA_TAG: self.fingerprint, IMAGE_REF_TAG: image}
        return {name: text for name, text in found.items() if text}

    @property
    def inputs(self) -> list[DatasetInput]:
        """The data as MLflow shows it."""
        if not self.fingerprint:
            return []
        name = Path(self.data).name or self.data
        source = json.dumps({"uri": self.data})
        data = Dataset(name, self.fingerprint[:LONGEST_DIGEST], "local", source)
        return [DatasetInput(data, [InputTag(CONTEXT_TAG, "training")])]


UNKNOWN = Lineage()
