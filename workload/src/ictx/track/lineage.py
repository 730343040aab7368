"""Lineage of a run's model: tags of the run and of its registered version, and the run's data set."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag

from ictx.registry import DATA_TAG, IMAGE_REF_TAG, PARENT_TAG, STAGE_TAG

CONTEXT_TAG = "mlflow.data.context"
"""MLflow's tag for the purpose of a data set."""
LONGEST_DIGEST = 36
"""Maximum characters of a data set's digest in MLflow."""


@dataclass(frozen=True)
class Lineage:
    """Origin of a model: stage, parent and data."""

    stage: str = ""
    """Training stage, such as `extend`."""
    parent: str = ""
    """Initial model: `NAME/VERSION`, or `run:/FOLDER` if it is not registered; empty: none."""
    data: str = ""
    """Folder of the data."""
    fingerprint: str = ""
    """Fingerprint of the data."""

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the known values."""
        reference, digest = (os.environ.get(name, "") for name in ("ICTX_IMAGE_REF", "ICTX_IMAGE_DIGEST"))
        image = f"{reference}@{digest}" if reference and digest else digest
        found = {STAGE_TAG: self.stage, PARENT_TAG: self.parent, DATA_TAG: self.fingerprint, IMAGE_REF_TAG: image}
        return {name: text for name, text in found.items() if text}

    @property
    def inputs(self) -> list[DatasetInput]:
        """The data as MLflow's data set inputs."""
        if not self.fingerprint:
            return []
        name = Path(self.data).name or self.data
        source = json.dumps({"uri": self.data})
        data = Dataset(name, self.fingerprint[:LONGEST_DIGEST], "local", source)
        return [DatasetInput(data, [InputTag(CONTEXT_TAG, "training")])]


UNKNOWN = Lineage()
